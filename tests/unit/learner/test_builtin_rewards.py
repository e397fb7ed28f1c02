"""Rewards that come with the learner, by hand."""

from typing import Any

import pytest

from learner.rewards.box_iou import box_iou
from learner.rewards.multiple_choice import multiple_choice


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("B", 1.0),
        (" (b). ", 1.0),
        ("A", 0.0),
        ("The answer is B.", 1.0),
        ("Answer: (B)", 1.0),
        ("**Answer:** **B**", 1.0),
        ("A dog has four legs, so the answer is B, not C", 1.0),
        ("First I thought the answer is A. No: the answer is B", 1.0),
        ("the answer is A, as in \\boxed{B}", 1.0),
        ("\\boxed{\\text{(B)}}", 1.0),
        ("\\boxed{A} or rather \\boxed{B}", 1.0),
        ("the answer is Berlin", 0.0),
        ("the answer is b dog", 0.0),
        ("A bear, I believe", 0.0),
        ("", 0.0),
    ],
)
def test_multiple_choice(completion: str, reward: float) -> None:
    assert multiple_choice(completion=completion, ground_truth="B") == reward
    assert multiple_choice(completion=completion, ground_truth="(b)") == reward


def test_a_ground_truth_that_is_no_letter_is_an_error() -> None:
    with pytest.raises(ValueError, match="'Berlin' is not a letter"):
        multiple_choice(completion="B", ground_truth="Berlin")


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("[1, 0, 3, 2]", 1.0),
        ("[0, 0, 2, 2]", 1 / 3),
        ("it is at (0.0, 0, 2, 2), or [1,0,3,2]", 1.0),
        ("[10, 10, 11, 11]", 0.0),
        ("[3, 2, 4, 3]", 0.0),
        ("[1, 0.5, 3, 1.5]", 0.5),
        ("[3, 2, 1, 0]", 0.0),
        ("[1, 0, 3]", 0.0),
        ("nowhere", 0.0),
    ],
)
def test_box_iou(completion: str, reward: float) -> None:
    assert box_iou(completion=completion, ground_truth=[1, 0, 3, 2]) == pytest.approx(reward)


@pytest.mark.parametrize("truth", [[], [1, 2, 3], [1, 0, 1, 2], [1, 0, float("nan"), 2]])
def test_a_ground_truth_that_is_no_box_is_an_error(truth: Any) -> None:
    with pytest.raises(ValueError, match="is not a box"):
        box_iou(completion="[1, 0, 3, 2]", ground_truth=truth)
