"""Rewards that score one completion at a time: ours, and verl's `compute_score`."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from learner.rewards.base import SCORE, Judgement, RewardError, ScoringTask, as_number
from learner.rewards.raised import raised

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
"""Functions with this argument may return a dictionary with a "score"; other numbers in it are measured too."""


def score_each(call: Callable[..., Any], name: str, task: ScoringTask, *, is_verl: bool) -> list[Judgement]:
    """One call for each completion. Raises `RewardError`."""
    return [_score_one(call, name, task, index, is_verl=is_verl) for index in range(len(task.texts))]


def _score_one(call: Callable[..., Any], name: str, task: ScoringTask, index: int, *, is_verl: bool) -> Judgement:
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
        raise raised(error, task.where(index), name) from error
    where = f"{task.where(index)} ({name})"
    if not (is_verl and isinstance(returned, Mapping)):
        return as_number(returned, returned, where)
    measured = {SCORE: as_number(returned.get(SCORE), returned, where)}
    for key in returned.keys() - {SCORE}:
        with contextlib.suppress(RewardError):  # a text, say
            measured[str(key)] = as_number(returned[key], returned, where)
    return measured
