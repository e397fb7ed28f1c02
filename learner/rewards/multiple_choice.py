"""The reward 1 for the right letter of a multiple-choice question."""

import re

from learner.rewards.answer import answer_of

_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Za-z])\)?\s*\}?\s*\}")
_STATED = re.compile(r"(?i:\b(?:answer|option|choice)\s*(?:\**\s*:|is\b))[\s:*]*\(?([A-Z])\)?(?![A-Za-z])")
_ALONE = re.compile(r"^\W*([A-Za-z])\W*$")


def multiple_choice(*, completion: str, ground_truth: object, **_: object) -> float:
    r"""1.0 if the completion chooses the letter of the ground truth, else 0.0, also where it chooses none.

    A choice is the last `\boxed{B}`, or else the last "the answer is B" or "Answer: (B)", or else a text that is one
    letter. The text is that of the last `<answer>...</answer>`, or else the completion.

    Raises:
        ValueError: the ground truth is no letter.

    Example: "It has four legs, so the answer is (B)." is worth 1.0 for the ground truth "B".
    """
    truth = _ALONE.match(str(ground_truth))
    if truth is None:
        raise ValueError(f"the ground truth {ground_truth!r} is not a letter")
    text = answer_of(completion)
    for pattern in (_BOXED, _STATED, _ALONE):
        found = pattern.findall(text)
        if found:
            return float(found[-1].upper() == truth.group(1).upper())
    return 0.0
