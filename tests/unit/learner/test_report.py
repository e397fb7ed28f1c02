"""What a run says of itself: the same to metrics.jsonl and to Prometheus, and docs/operations.md has every key."""

import dataclasses
import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from learner.display import Display
from learner.evaluate import Evaluation
from learner.metrics import LearnerMetrics
from learner.report import Progress, Reporter
from learner.rollouts.dispatcher import DispatchStats
from learner.step import StepStats
from learner.summary import MetricsWriter
from tests.fakes import make_group

OPERATIONS = Path(__file__).resolve().parents[3] / "docs" / "operations.md"
NO_GROUPS = DispatchStats(0, 0, 0, 0, {"STALE": 1}, {"HUNG": 2})


def _stats(parity_tokens: int = 8) -> StepStats:
    """The number of a field, from 1, stands for its value."""
    values: dict[str, Any] = {field.name: float(i) for i, field in enumerate(dataclasses.fields(StepStats), 1)}
    return StepStats(**values | {"skipped": False, "parity_tokens": parity_tokens})


def _report(folder: Path, metrics: LearnerMetrics, *, parity_tokens: int = 8) -> tuple[dict[str, Any], dict[str, Any]]:
    """The lines of a step and of the evaluation after it."""
    writer = MetricsWriter(folder / "metrics.jsonl")
    display = Display(name="x", total_steps=2, run_dir=folder, stream=StringIO())
    reporter = Reporter(display, writer, Progress(), metrics.measured)
    group = dataclasses.replace(make_group(0), rewards=np.array([0.25, 0.75], np.float32))
    reporter.step(1, [group], _stats(parity_tokens), NO_GROUPS, wait_s=0.5)
    reporter.accuracy(1, Evaluation(0.625, 8, 12.5, {1: 0.5, 4: 0.75}))
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
    watched = {"reward", "accuracy", "loss", "grad_norm", "clip_fraction", "kl", "entropy", "parity_max_abs_diff"}
    assert _shown(metrics, line) == {key: line[key] for key in watched}
    assert (line["reward"], line["accuracy"], line["loss"], line["grad_norm"]) == (0.5, 0.625, 1.0, 2.0)


def test_held_out_rows_without_a_score_are_told(tmp_path: Path) -> None:
    said, writer = StringIO(), MetricsWriter(tmp_path / "metrics.jsonl")
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
    assert _shown(metrics, step).keys() == {"reward", "loss", "grad_norm", "clip_fraction", "kl", "entropy"}


def test_the_table_in_the_docs_has_every_key(tmp_path: Path) -> None:
    lines = _report(tmp_path, _metrics())
    [section] = re.findall(r"^### metrics.jsonl\n(.+?)^## ", OPERATIONS.read_text(), re.DOTALL | re.MULTILINE)
    tables = [
        {key for row in re.findall(r"^\| ([*`].+?) \|", table, re.MULTILINE) for key in re.findall(r"`(.+?)`", row)}
        for table in section.split("\n\n")
        if table.startswith("|")
    ]
    assert tables == [set(lines[0]), {re.sub(r"^pass@\d+$", "pass@k", key) for key in lines[1]}]
