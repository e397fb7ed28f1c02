"""The reward 1 for the right answer and 0 for any other."""

from learner.rewards.builtin.answer import answer_of


def exact_match(*, completion: str, ground_truth: object, **_: object) -> float:
    r"""1.0 if the answer is the ground truth, surrounding white space aside, else 0.0.

    The answer is the text of the last `<answer>...</answer>`, or else the completion.

    Example: " 7\n" and "<think>3 + 4</think><answer>7</answer>" are worth 1.0 for the ground truth 7.
    """
    return float(answer_of(completion).strip() == str(ground_truth).strip())
