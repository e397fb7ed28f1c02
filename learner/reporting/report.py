"""What a run says of itself, on rank 0: each step to the display and to files, the whole in the summary."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.types import FinishReason, FloatArray
from learner.evaluate import Evaluation
from learner.reporting.completions_log import CompletionsLog
from learner.reporting.display import Display, StepReport
from learner.reporting.json_lines import JsonLines
from learner.reporting.summary import Summary
from learner.rollouts.dispatcher import SKIPPED, STALE, DispatchStats
from learner.training.step import StepStats
from learner.types import Group, RewardParts


@dataclasses.dataclass(slots=True)
class Progress:
    """What the summary is made of; survives in checkpoints."""

    accuracy_before: float | None = None
    accuracy_after: float | None = None
    evaluated_version: int | None = None
    """That `accuracy_after` is of."""
    pass_at_k_before: dict[str, float] = dataclasses.field(default_factory=dict)
    pass_at_k_after: dict[str, float] = dataclasses.field(default_factory=dict)
    parity_max_abs_diff: float | None = None
    num_completions: int = 0
    steps_s: float = 0.0
    """From the first batch to the last step, evaluations and checkpoints included."""
    wall_s: float = 0.0
    resumed_from: list[int] = dataclasses.field(default_factory=list)


class Reporter:
    """Collects and shows. The clock of a step runs from the end of the step before, whatever lay between."""

    def __init__(
        self,
        display: Display,
        metrics: JsonLines,
        progress: Progress,
        also: Sequence[Callable[[Mapping[str, Any]], None]] = (),
        completions: CompletionsLog | None = None,
    ) -> None:
        """Each of `also` gets what is written to `metrics`."""
        self._display = display
        self._metrics = metrics
        self._also = also
        self._completions = completions
        self._progress = progress
        self._said_no_parity = False
        self._num_dropped = 0
        self._started_at = time.monotonic() - progress.wall_s
        self._step_ended_at = time.monotonic()

    def training_begins(self) -> None:
        """The clock of the first step starts."""
        self._step_ended_at = time.monotonic()

    def step(
        self,
        version: int,
        groups: Sequence[Group],
        stats: StepStats,
        dispatch: DispatchStats,
        *,
        wait_s: float,
        overlong_penalties: Sequence[FloatArray] | None = None,
    ) -> None:
        """The step that led to `version` is done; `wait_s` of it went by waiting for `groups`.

        `overlong_penalties`: as `Batch` has them.
        """
        now = time.monotonic()
        step_s, self._step_ended_at = now - self._step_ended_at, now
        num_completions = sum(len(group.completions) for group in groups)
        rewards = describe_rewards(groups)
        staleness = sum(version - 1 - group.oldest_version for group in groups) / len(groups)
        parity = stats.parity_max_abs_diff if stats.parity_tokens else None
        if parity is None and not self._said_no_parity:
            self._display.note(
                f"parity: the current policy sampled no token of step {version}, so none is measured there"
            )
            self._said_no_parity = True
        # A stale group is sampled again, and those of a skipped step are among `groups`.
        num_dropped = sum(number for reason, number in dispatch.dropped.items() if reason not in (STALE, SKIPPED))
        new_drops, self._num_dropped = num_dropped - self._num_dropped, num_dropped
        progress = self._progress
        progress.num_completions += num_completions
        progress.steps_s += step_s
        if parity is not None:
            # NaN is larger than any number here.
            progress.parity_max_abs_diff = float(np.maximum(parity, progress.parity_max_abs_diff or 0.0))
        self._display.step(
            StepReport(
                step=version,
                reward=rewards["reward"],
                completions_per_s=num_completions / step_s,
                staleness=staleness,
                parity=parity,
                step_s=step_s,
                loss=stats.loss,
                entropy=stats.entropy,
                dropped=new_drops / (new_drops + len(groups)),
                uniform=rewards["uniform_fraction"],
            )
        )
        self._write(
            {
                "step": version,
                **rewards,
                **describe_penalties(overlong_penalties),
                "completions_per_s": num_completions / step_s,
                "staleness": staleness,
                **dataclasses.asdict(stats),
                "parity_max_abs_diff": parity,
                "step_s": step_s,
                "wait_s": wait_s,
                "groups_dropped": dispatch.dropped,
                "groups_resent": dispatch.retries,
                "sequences": [group.sequence for group in groups],
                "wall_s": now - self._started_at,
            }
        )
        if self._completions is not None:
            self._completions.step(version, groups)

    def note(self, line: str) -> None:
        """What the user should know."""
        self._display.note(line)

    def phase(self, text: str) -> None:
        """What goes on now."""
        self._display.phase(text)

    @property
    def evaluated_version(self) -> int | None:
        """The last one of which the accuracy is known."""
        return self._progress.evaluated_version

    def accuracy(self, version: int, result: Evaluation) -> None:
        """The held-out rows were evaluated."""
        if version == 0:
            self._progress.accuracy_before = result.accuracy
        self._progress.accuracy_after = result.accuracy
        self._progress.evaluated_version = version
        rates = {str(k): rate for k, rate in result.pass_at_k.items()}  # as JSON has them
        if version == 0:
            self._progress.pass_at_k_before = rates
        self._progress.pass_at_k_after = rates
        self._display.accuracy(version, result.accuracy)
        if result.failed:
            reasons = ", ".join(f"{reason} {count}" for reason, count in result.failed.items())
            num_asked = result.num_rows + sum(result.failed.values())
            self._display.note(
                f"{self._display.held_out.name} is of {result.num_rows} of {num_asked} rows; without a score: {reasons}"
            )
        if rates:
            self._display.note("  ".join(f"pass@{k} {rate:.1%}" for k, rate in rates.items()))
        self._write(
            {
                "step": version,
                "accuracy": result.accuracy,
                "eval_rows": result.num_rows,
                "eval_failed": result.failed,
                "eval_tokens": result.mean_tokens,
                "eval_reward_parts": mean_parts(result.reward_parts),
                **{f"pass@{k}": rate for k, rate in rates.items()},
            }
        )
        if self._completions is not None:
            self._completions.evaluation(version, result)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the fields of `Progress`."""
        self._progress.wall_s = time.monotonic() - self._started_at
        return dataclasses.asdict(self._progress)

    def summary(self, name: str, seed: int, version: int, export: Path) -> Summary:
        """The run in numbers."""
        progress = self._progress
        rates = {}
        if progress.pass_at_k_after:
            rates = {"pass_at_k_before": progress.pass_at_k_before, "pass_at_k_after": progress.pass_at_k_after}
        return Summary(
            name=name,
            steps=version,
            accuracy_before=progress.accuracy_before,
            accuracy_after=progress.accuracy_after,
            completions_per_s=progress.num_completions / max(progress.steps_s, 1e-9),
            parity_max_abs_diff=progress.parity_max_abs_diff,
            wall_s=time.monotonic() - self._started_at,
            checkpoint=str(export),
            extra={"resumed_from": progress.resumed_from, "seed": seed} | rates,
        )

    def _write(self, values: dict[str, Any]) -> None:
        self._metrics.write(values)
        for tell in self._also:
            tell(values)


def describe_rewards(groups: Sequence[Group]) -> dict[str, Any]:
    """The rewards of a step in numbers, under their names in metrics.jsonl."""
    completions = [completion for group in groups for completion in group.completions]
    return {
        "reward": float(sum(group.rewards.sum() for group in groups)) / len(completions),
        "reward_std": float(np.mean([group.rewards.std(ddof=1) for group in groups])),
        "reward_parts": mean_parts([group.reward_parts for group in groups]),
        "uniform_fraction": float(np.mean([group.rewards.min() == group.rewards.max() for group in groups])),
        "truncated_fraction": float(np.mean([each.finish_reason is FinishReason.LENGTH for each in completions])),
    }


def describe_penalties(of_groups: Sequence[FloatArray] | None) -> dict[str, float | None]:
    """What completions have lost of their rewards for their length, under its names in metrics.jsonl."""
    if of_groups is None:
        return {"overlong_penalty": None, "overlong_fraction": None}
    lost = np.concatenate(of_groups)
    return {"overlong_penalty": float(lost.mean()), "overlong_fraction": float((lost > 0).mean())}


def mean_parts(of_groups: Sequence[RewardParts]) -> dict[str, float | None]:
    """The mean of each part of the rewards, over the completions that have it; None where none has."""
    means: dict[str, float | None] = {}
    for name in dict.fromkeys(name for parts in of_groups for name in parts):
        values = [value for parts in of_groups for value in parts.get(name, ()) if value is not None]
        means[name] = sum(values) / len(values) if values else None
    return means
