"""Rewards that score one completion at a time: ours, and verl's `compute_score`."""

from collections.abc import Callable, Mapping
from typing import Any

from learner.rewards.base import RewardError, ScoringTask, as_number

KEYWORDS = (
    "completion",
    "ground_truth",
    "images",
    "extra",
    "data_source",
    "prompt",
    "token_ids",
    "finish_reason",
    "solution_str",
    "extra_info",
)
"""What such a function may ask for; docs/rewards.md says what each is."""

VERL = "solution_str"
"""Functions with this argument may return a dictionary with a "score"."""


def score_each(call: Callable[..., Any], name: str, task: ScoringTask, *, is_verl: bool) -> list[float | None]:
    """One call for each completion. Raises `RewardError`."""
    return [_score_one(call, name, task, index, is_verl=is_verl) for index in range(len(task.texts))]


def _score_one(call: Callable[..., Any], name: str, task: ScoringTask, index: int, *, is_verl: bool) -> float:
    sample, text = task.sample, task.texts[index]
    try:
        returned = call(
            completion=text,
            solution_str=text,
            ground_truth=sample.ground_truth,
            images=sample.images,
            extra=sample.extra,
            extra_info=sample.extra.get("extra_info", sample.extra),
            data_source=sample.data_source,
            prompt=sample.messages,
            token_ids=task.token_ids[index],
            finish_reason=task.finish_reasons[index],
        )
    except Exception as error:  # a user's code: whatever it raises costs this group
        message = f"{task.where(index)}: {type(error).__name__}: {error} ({name})"
        raise RewardError("REWARD_RAISED", message) from error
    value = returned.get("score") if is_verl and isinstance(returned, Mapping) else returned
    return as_number(value, returned, f"{task.where(index)} ({name})")
