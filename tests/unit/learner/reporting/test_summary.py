"""What a run leaves behind."""

import base64
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from common import wire
from common.pb.rollout.v1 import rollout_pb2
from common.types import ChatMessage, ChatPrompt, MediaPart, SamplingParams, TextPart
from learner.config import RewardConfig
from learner.reporting.held_out import ACCURACY, REWARD, HeldOut, held_out_of
from learner.reporting.json_lines import JsonLines
from learner.reporting.question import write_question
from learner.reporting.summary import Summary, format_duration, format_summary, write_summary
from learner.types import PixelBounds, PromptSample

SUMMARY = Summary("digits", 120, 0.314, 0.925, 512.25, 4.7e-7, 301.5, "runs/digits-1/export", {"seed": 3})


def test_metrics_are_one_json_object_per_line_and_a_resumed_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(2):
        writer = JsonLines(path)
        writer.write({"step": step, "reward": np.float32(0.5), "mismatch_kl": float("nan"), "ages": (np.int64(1), 2)})
        # On disk before the writer is closed.
        assert len(path.read_text().splitlines()) == step + 1
        writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": step, "reward": 0.5, "mismatch_kl": None, "ages": [1, 2]} for step in range(2)]


def test_a_line_that_a_kill_has_torn_is_gone_once_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rewa')
    writer = JsonLines(path)
    writer.write({"step": 2})
    writer.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_summary_json_has_the_promised_fields(tmp_path: Path) -> None:
    path = write_summary(tmp_path, SUMMARY)
    assert path == tmp_path / "summary.json"
    assert json.loads(path.read_text()) == {
        "name": "digits",
        "steps": 120,
        "accuracy_before": 0.314,
        "accuracy_after": 0.925,
        "completions_per_s": 512.25,
        "parity_max_abs_diff": 4.7e-7,
        "wall_s": 301.5,
        "checkpoint": "runs/digits-1/export",
        "seed": 3,
    }
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="steps"):
        write_summary(tmp_path, Summary("x", 1, None, None, 1.0, None, 1.0, "c", {"steps": 2}))


def test_the_question_is_a_request_that_the_server_reads(tmp_path: Path) -> None:
    image = b"\x89PNG\r\n\x1a\n rest"
    sample = PromptSample(0, (ChatMessage("user", (MediaPart(0), TextPart("digit?"))),), (image,), "3")
    bounds, arguments = (PixelBounds(max_pixels=5000),), {"enable_thinking": False}
    sample = dataclasses.replace(sample, image_bounds=bounds, template_arguments=arguments)
    path = write_question(tmp_path, sample, SamplingParams(n=4, max_tokens=8, stop=("</answer>",)))
    assert (tmp_path / "question.png").read_bytes() == image
    request = wire.request_from_proto(json_format.Parse(path.read_text(), rollout_pb2.GenerateRequest()))
    assert request.prompt == ChatPrompt(sample.messages, arguments)
    assert request.media[0].encoded == image
    assert (request.media[0].min_pixels, request.media[0].max_pixels) == (None, 5000)
    assert (request.sampling.temperature, request.sampling.max_tokens, request.return_text) == (0.0, 8, True)
    assert base64.b64encode(image).decode() in path.read_text()


def test_the_end_says_how_to_go_on(tmp_path: Path) -> None:
    text = format_summary(SUMMARY, tmp_path / "question.json")
    assert "31.4% before, 92.5% after" in text
    assert "120 steps in 5:02, without the wait for actors" in text
    assert "python -m actor --model runs/digits-1/export --listen 127.0.0.1:50051 --standalone" in text
    assert f"rollout.v1.RolloutService/Generate < {tmp_path}/question.json" in text
    assert "not measured" in format_summary(Summary("x", 1, None, None, 1.0, None, 1.0, "c"))


def test_the_end_calls_a_weighted_sum_no_accuracy() -> None:
    text = format_summary(SUMMARY, held_out=REWARD)
    assert "\n  held-out reward    0.314 before, 0.925 after\n" in text
    assert "%" not in text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ACCURACY),
        ({"weights": [1]}, ACCURACY),
        ({"weights": [0.5]}, REWARD),
        ({"functions": ["exact_match", "format"]}, REWARD),
        ({"functions": ["exact_match", "format"], "weights": [1, 0]}, REWARD),
    ],
)
def test_only_one_function_alone_is_an_accuracy(values: dict[str, Any], expected: HeldOut) -> None:
    assert held_out_of(RewardConfig.model_validate(values)) == expected


def test_buf_is_named_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the PATH, or beside the interpreter: an environment need not be activated."""
    on_path, beside = tmp_path / "on_path", tmp_path / "of an environment"
    for directory in (on_path, beside):
        directory.mkdir()
    monkeypatch.setenv("PATH", str(on_path))
    monkeypatch.setattr(sys, "executable", str(beside / "python"))

    def commands() -> list[str]:
        lines = format_summary(SUMMARY, tmp_path / "question.json").splitlines()
        return [line.split(" curl ")[0].strip() for line in lines if " curl " in line]

    assert commands() == []
    for directory, name in ((beside, f"'{beside}/buf'"), (on_path, "buf")):
        (directory / "buf").touch(0o755)
        assert commands() == [name]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
