"""completions.jsonl: what the policy wrote, as it was sampled, in files of bounded size."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.types import FinishReason
from learner.evaluate import Evaluation
from learner.reporting.completions_log import CompletionsLog
from tests.helpers.fakes import make_group


def decode(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_line_has_all_of_a_completion(tmp_path: Path) -> None:
    group = make_group(3, version=6)
    cut = dataclasses.replace(group.completions[1], finish_reason=FinishReason.LENGTH)
    group = dataclasses.replace(
        group,
        rewards=np.array([1.5, 0.5], np.float32),
        reward_parts={"right": (1.0, 0.0), "short": (0.5, None)},
        completions=(group.completions[0], cut),
        sample=dataclasses.replace(group.sample, ground_truth={"boxes": np.array([[1, 2], [3, 4]])}),
        processed=dataclasses.replace(group.processed, media_sha256=(b"\x01\xff",)),
    )
    log = CompletionsLog(tmp_path / "completions.jsonl", 1, decode)
    log.step(7, [group, make_group(4)])
    first, second = lines_of(tmp_path / "completions.jsonl")  # before the log is closed
    log.close()
    assert first == {
        "step": 7,
        "rows": "train",
        "row": 3,
        "images": ["01ff"],
        "prompt": decode(group.prompt.unexpanded_ids.tolist()),
        "completion": decode(group.completions[0].token_ids.tolist()),
        "ground_truth": {"boxes": [[1, 2], [3, 4]]},
        "reward": 1.5,
        "reward_parts": {"right": 1.0, "short": 0.5},
        "finish_reason": "stop",
        "num_tokens": 2,
        "policy_versions": [6],
    }
    assert (second["reward_parts"], second["finish_reason"]) == ({"right": 0.0, "short": None}, "length")


def test_an_evaluation_has_the_rows_that_were_kept(tmp_path: Path) -> None:
    log = CompletionsLog(tmp_path / "completions.jsonl", 1, decode)
    log.evaluation(5, Evaluation(0.5, 99, 2.0, groups=tuple(make_group(row, n=1) for row in range(3))))
    log.close()
    lines = lines_of(tmp_path / "completions.jsonl")
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert {(line["step"], line["rows"]) for line in lines} == {(5, "held_out")}


@pytest.mark.parametrize("text", ["5 > 3 \u2028 \u4e94", "half of a pair: \ud83d", "two\nlines"])
def test_whatever_is_sampled_is_read_again(tmp_path: Path, text: str) -> None:
    log = CompletionsLog(tmp_path / "completions.jsonl", 1, lambda _: text)
    log.step(1, [make_group(0)])
    log.close()
    assert [line["completion"] for line in lines_of(tmp_path / "completions.jsonl")] == [text] * 2


def test_what_is_long_loses_its_middle(tmp_path: Path) -> None:
    log = CompletionsLog(tmp_path / "completions.jsonl", 1, lambda _: "a" * 10_000 + "b" * 7 + "c" * 10_000)
    group = make_group(0)
    truth = {"tests": list(range(10_000))}
    log.step(1, [dataclasses.replace(group, sample=dataclasses.replace(group.sample, ground_truth=truth))])
    log.close()
    line = lines_of(tmp_path / "completions.jsonl")[0]
    assert line["completion"] == line["prompt"] == "a" * 10_000 + " [... 7 characters ...] " + "c" * 10_000
    assert line["ground_truth"].startswith('{"tests": [0, 1, 2')
    assert len(line["ground_truth"]) < 20_100


def test_a_resumed_run_goes_on_behind_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "comp')
    log = CompletionsLog(path, 1, decode)
    log.step(2, [make_group(0)])
    log.close()
    assert [line["step"] for line in lines_of(path)] == [1, 2, 2]


def test_zero_writes_no_file(tmp_path: Path) -> None:
    log = CompletionsLog(tmp_path / "completions.jsonl", 0, decode)
    log.step(1, [make_group(0)])
    log.evaluation(1, Evaluation(0.5, 1, 2.0, groups=(make_group(0, n=1),)))
    log.close()
    assert list(tmp_path.iterdir()) == []
