"""What a run says of itself: the same to metrics.jsonl and to Prometheus, and docs/metrics.md has every key."""

import dataclasses
import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.types import FinishReason
from learner.evaluate import Evaluation
from learner.reporting.display import Display
from learner.reporting.json_lines import JsonLines
from learner.reporting.metrics import LearnerMetrics
from learner.reporting.report import Progress, Reporter, describe_rewards
from learner.rollouts.dispatcher import DispatchStats
from learner.training.step import StepStats
from tests.helpers.fakes import make_group

METRICS = Path(__file__).resolve().parents[4] / "docs" / "metrics.md"
GROUP = dataclasses.replace(
    make_group(0), rewards=np.array([0.25, 0.75], np.float32), reward_parts={"right": (0, 1), "short": (None, 0.5)}
)
NO_GROUPS = DispatchStats(0, {"STALE": 1}, {"HUNG": 2})


def _stats(parity_tokens: int = 8) -> StepStats:
    """The number of a field, from 1, stands for its value."""
    values: dict[str, Any] = {field.name: float(i) for i, field in enumerate(dataclasses.fields(StepStats), 1)}
    return StepStats(**values | {"skipped": False, "parity_tokens": parity_tokens})


def _report(folder: Path, metrics: LearnerMetrics, *, parity_tokens: int = 8) -> tuple[dict[str, Any], dict[str, Any]]:
    """The lines of a step and of the evaluation after it."""
    writer = JsonLines(folder / "metrics.jsonl")
    display = Display(name="x", total_steps=2, run_dir=folder, stream=StringIO())
    reporter = Reporter(display, writer, Progress(), [metrics.measured])
    reporter.step(1, [GROUP], _stats(parity_tokens), NO_GROUPS, wait_s=0.5)
    reporter.accuracy(
        1, Evaluation(0.625, 8, 12.5, {1: 0.5, 4: 0.75}, reward_parts=(GROUP.reward_parts,), groups=(GROUP,))
    )
    writer.close()
    step, evaluation = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return step, evaluation


def _metrics() -> LearnerMetrics:
    return LearnerMetrics(members=tuple, stats=lambda: NO_GROUPS, num_buffered=int)


def _shown(metrics: LearnerMetrics, line: dict[str, Any]) -> dict[str, float]:
    """What Prometheus sees under the keys of a line."""
    values = {key: metrics.registry.get_sample_value(f"outrider_learner_{key}") for key in line}
    return {key: value for key, value in values.items() if value is not None}


def test_prometheus_shows_what_is_watched_of_both_lines(tmp_path: Path) -> None:
    metrics = _metrics()
    step, evaluation = _report(tmp_path, metrics)
    line = step | evaluation
    watched = {
        "reward",
        "accuracy",
        "loss",
        "grad_norm",
        "clip_fraction",
        "mismatch_kl",
        "entropy",
        "parity_max_abs_diff",
    }
    watched |= {"reward_std", "uniform_fraction", "truncated_fraction"}
    assert _shown(metrics, line) == {key: line[key] for key in watched}
    names = {"step_s": "step_seconds", "completions_per_s": "completions_per_second", "num_tokens": "step_tokens"}
    for key, name in names.items():
        assert metrics.registry.get_sample_value(f"outrider_learner_{name}") == line[key]
    right = metrics.registry.get_sample_value("outrider_learner_reward_parts", {"name": "right"})
    assert right == line["reward_parts"]["right"] == 0.5
    assert (line["reward"], line["accuracy"], line["loss"], line["grad_norm"]) == (0.5, 0.625, 1.0, 2.0)


def test_held_out_rows_without_a_score_are_told(tmp_path: Path) -> None:
    said, writer = StringIO(), JsonLines(tmp_path / "metrics.jsonl")
    reporter = Reporter(Display(name="x", total_steps=2, run_dir=tmp_path, stream=said), writer, Progress())
    reporter.accuracy(0, Evaluation(0.5, 500, 12.5))
    assert "without a score" not in said.getvalue()
    reporter.accuracy(1, Evaluation(0.625, 497, 12.5, failed={"REWARD_RAISED": 2, "INVALID_REQUEST": 1}))
    writer.close()
    line = "held-out accuracy is of 497 of 500 rows; without a score: REWARD_RAISED 2, INVALID_REQUEST 1"
    assert line in said.getvalue()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [each["eval_failed"] for each in lines] == [{}, {"REWARD_RAISED": 2, "INVALID_REQUEST": 1}]


def test_what_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    metrics = _metrics()
    assert _shown(metrics, {"reward": 0.0, "accuracy": 0.0}) == {}
    _report(tmp_path, metrics)
    assert "parity_max_abs_diff" in _shown(metrics, {"parity_max_abs_diff": 0.0})
    (tmp_path / "second").mkdir()
    step, _ = _report(tmp_path / "second", metrics, parity_tokens=0)
    assert step["parity_max_abs_diff"] is None
    rewards = {"reward", "reward_std", "uniform_fraction", "truncated_fraction"}
    assert _shown(metrics, step).keys() == rewards | {"loss", "grad_norm", "clip_fraction", "mismatch_kl", "entropy"}


def test_the_rewards_of_a_step_by_hand() -> None:
    """Groups of two: [0, 0], [0, 1] and [1, 2], whose standard deviations are 0, 1/sqrt(2) and 1/sqrt(2)."""
    groups = []
    for i, rewards in enumerate(([0, 0], [0, 1], [1, 2])):
        group = make_group(i)
        cut = (group.completions[0], dataclasses.replace(group.completions[1], finish_reason=FinishReason.LENGTH))
        parts = {"judge": (None, i)} | ({"judge.tries": (4, None)} if i else {"never": (None, None)})
        values = np.array(rewards, np.float32)
        groups.append(dataclasses.replace(group, rewards=values, reward_parts=parts, completions=cut))
    groups[2] = dataclasses.replace(groups[2], completions=make_group(2).completions)
    assert describe_rewards(groups) == {
        "reward": pytest.approx(4 / 6),
        "reward_std": pytest.approx(2 / 3 / 2**0.5),
        "reward_parts": {"judge": 1.0, "never": None, "judge.tries": 4.0},
        "uniform_fraction": pytest.approx(1 / 3),
        "truncated_fraction": pytest.approx(2 / 6),
    }


def test_what_long_completions_lose_is_told(tmp_path: Path) -> None:
    writer = JsonLines(tmp_path / "metrics.jsonl")
    reporter = Reporter(Display(name="x", total_steps=2, run_dir=tmp_path, stream=StringIO()), writer, Progress())
    lost = [np.array(values, np.float32) for values in ([0, 0.5], [0.25, 0, 0])]
    for step, penalties in enumerate((None, lost), 1):
        reporter.step(step, [GROUP], _stats(), NO_GROUPS, wait_s=0.5, overlong_penalties=penalties)
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["overlong_penalty"] for line in lines] == [None, pytest.approx(0.15)]
    assert [line["overlong_fraction"] for line in lines] == [None, 0.4]


def test_the_share_of_dropped_groups_is_that_of_the_step_and_shown_unless_small(tmp_path: Path) -> None:
    stream = StringIO()
    display = Display(name="x", total_steps=9, run_dir=tmp_path, stream=stream)
    reporter = Reporter(display, JsonLines(tmp_path / "metrics.jsonl"), Progress())
    batch = [make_group(i) for i in range(30)]
    drops: list[dict[str, int]] = [{"A": 20}, {"A": 21, "STALE": 99}, {"A": 21, "B": 30, "STALE": 99}]
    for step, dropped in enumerate(drops, 1):
        stats = DispatchStats(0, dropped, {})
        reporter.step(step, batch, _stats(), stats, wait_s=0.0)
    assert [re.findall(r"dropped (\S+)", line) for line in stream.getvalue().splitlines()] == [["40%"], [], ["50%"]]


def test_the_table_in_the_docs_has_every_key(tmp_path: Path) -> None:
    lines = _report(tmp_path, _metrics())
    [section] = re.findall(r"^## metrics.jsonl\n(.+?)^## ", METRICS.read_text(), re.DOTALL | re.MULTILINE)
    tables = [
        {key for row in re.findall(r"^\| ([*`].+?) \|", table, re.MULTILINE) for key in re.findall(r"`(.+?)`", row)}
        for table in section.split("\n\n")
        if table.startswith("|")
    ]
    assert tables == [set(lines[0]), {re.sub(r"^pass@\d+$", "pass@k", key) for key in lines[1]}]
