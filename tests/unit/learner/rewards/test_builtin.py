"""Rewards that come with the learner, by hand."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from learner.rewards.builtin.answer_format import answer_format
from learner.rewards.builtin.box_iou import box_iou
from learner.rewards.builtin.exact_match import exact_match
from learner.rewards.builtin.math_equal import math_equal
from learner.rewards.builtin.multiple_choice import multiple_choice
from learner.rewards.builtin.ocr import ocr


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("7", 1.0),
        (" 7\n", 1.0),
        ("77", 0.0),
        ("", 0.0),
        ("<think>7</think><answer> 7 </answer>", 1.0),
        ("<answer>7</answer> or <answer>8</answer>", 0.0),
        ("<answer>8</answer> no <answer>7</answer>", 1.0),
        ("<think>It goes between <answer> and </think> or so.</think><answer>7</answer>", 1.0),
        ("<answer>\n<answer>7</answer>", 1.0),
        ("<answer>7", 0.0),
    ],
)
def test_exact_match(completion: str, reward: float) -> None:
    assert exact_match(completion=completion, ground_truth=7) == reward


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
        ("<think>A or B?</think><answer>B</answer>", 1.0),
        ("<think>The answer is B</think><answer>A</answer>", 0.0),
        ("\\boxed{A} or rather \\boxed{B}", 1.0),
        ("B. Cat", 1.0),
        ("(B) cat", 1.0),
        ("A. Dog\nB. Cat", 0.0),
        ("The answer is option B", 1.0),
        ("Option A is wrong. Choice B is right.", 1.0),
        ("\\boxed{B. cat}", 1.0),
        ("\\boxed{\\mathbf{B}}", 1.0),
        ("\\boxed{big}", 0.0),
        ("The answer is B because it has four legs", 1.0),
        ("The answer is A dog. Answer: B", 1.0),
        ("the answer is Berlin", 0.0),
        ("the answer is b dog", 0.0),
        ("A bear, I believe", 0.0),
        ("", 0.0),
    ],
)
def test_multiple_choice(completion: str, reward: float) -> None:
    assert multiple_choice(completion=completion, ground_truth="B") == reward
    assert multiple_choice(completion=completion, ground_truth="(b)") == reward


def test_the_letter_a_may_be_an_article() -> None:
    assert multiple_choice(completion="The answer is A dog", ground_truth="A") == 0.0
    assert multiple_choice(completion="The answer is A because it barks", ground_truth="A") == 1.0
    assert multiple_choice(completion="The answer is A in the picture", ground_truth="A") == 1.0
    assert multiple_choice(completion="e.g. a cat", ground_truth="E") == 0.0


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


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>3 + 4</think><answer>7</answer>", 1.0),
        ("\n<think>\n3 + 4\n</think>\n\n<answer>\n7\n</answer>\n", 1.0),
        ("<think>a < b</think><answer><b>7</b></answer>", 1.0),
        ("<answer>7</answer>", 0.0),
        ("<think>3 + 4</think>7", 0.0),
        ("<answer>7</answer><think>3 + 4</think>", 0.0),
        ("<think>3 + 4</think><answer>7", 0.0),
        ("<think></think><answer>7</answer>", 0.0),
        ("<think>3 + 4</think><answer> </answer>", 0.0),
        ("Well. <think>3 + 4</think><answer>7</answer>", 0.0),
        ("<think>3 + 4</think> so <answer>7</answer>", 0.0),
        ("<think>3 + 4</think><answer>7</answer> Bye.", 0.0),
        ("<think>3</think><think>4</think><answer>7</answer>", 0.0),
        ("<think>3 + 4<answer>8</answer></think><answer>7</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(completion: str, reward: float) -> None:
    assert answer_format(completion=completion, ground_truth="not looked at") == reward


@pytest.mark.parametrize(
    ("completion", "truth", "reward"),
    [
        ("sitting", "sitting", 1.0),
        ("kitten", "sitting", 1 - 3 / 7),  # k -> s, e -> i, g added
        ("Sitting", "sitting", 1 - 1 / 7),
        ("siting", "sitting", 1 - 1 / 7),
        ("xyz", "abc", 0.0),
        ("", "abc", 0.0),
        ("abc", "", 0.0),
        ("", "", 1.0),
        ("TOTAL\n  12.50 \n", "TOTAL 12.50", 1.0),
        ("TOTAL12.50", "TOTAL 12.50", 1 - 1 / 11),
        ("cafe\u0301", "caf\u00e9", 1.0),
        ("<think>hm</think><answer>abd</answer>", "abc", 1 - 1 / 3),
        ("abc", ["xyz", "abd"], 1 - 1 / 3),
    ],
)
def test_ocr(completion: str, truth: Any, reward: float) -> None:
    assert ocr(completion=completion, ground_truth=truth) == pytest.approx(reward)


@pytest.mark.parametrize("truth", [7, [], ["a", 7]])
def test_a_ground_truth_that_is_no_text_is_an_error(truth: Any) -> None:
    with pytest.raises(ValueError, match="is neither a text nor a list of texts"):
        ocr(completion="a", ground_truth=truth)


@pytest.mark.parametrize(
    ("completion", "truth", "reward"),
    [
        ("so it is \\boxed{0.5}", "1/2", 1.0),
        ("$\\frac{2}{4}$", "1/2", 1.0),
        ("The answer is 0.5.", r"$\frac{1}{2}$", 1.0),
        ("0.33", "1/3", 0.0),
        ("$\\sqrt{12}$", r"2\sqrt{3}", 1.0),
        ("$x^2 + 2x + 1$", "(x+1)^2", 1.0),
        ("$x^2 + 1$", "(x+1)^2", 0.0),
        ("$\\{2, 1\\}$", r"\{1, 2\}", 1.0),
        ("$(2, 1)$", "(1, 2)", 0.0),
        ("$x = 3$", "3", 1.0),
        ("1000", "1,000", 1.0),
        ("first 7, then 8", "8", 1.0),
        ("first 7, then 8", "7", 0.0),
        ("<think>is it 8?</think><answer>7</answer>", 7, 1.0),
        ("<think>$7$</think><answer>8</answer>", 7, 0.0),
        ("I do not know", "7", 0.0),
        ("$\\frac{1}{", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_math_equal(completion: str, truth: Any, reward: float) -> None:
    assert math_equal(completion=completion, ground_truth=truth) == reward


def test_math_equal_works_in_any_thread() -> None:
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(math_equal, completion="$1/2$", ground_truth="0.5").result() == 1.0


def test_a_ground_truth_that_is_no_mathematics_is_an_error() -> None:
    with pytest.raises(ValueError, match="'' is no mathematics"):
        math_equal(completion="7", ground_truth="")
