"""The reward 1 for the right letter of a multiple-choice question."""

import re

from learner.rewards.builtin.answer import answer_of

_BOXED = re.compile(r"\\boxed\{\W*(?:(?:text|textbf|textrm|mathbf|mathrm)\{\W*)?([A-Za-z])\s*[}).:,]")
# "The answer is A dog" chooses nothing, and "the answer is A because" does.
_STATED = re.compile(
    r"(?i:\b(?:answer|option|choice)\s*(?:\**\s*:|is\b)[\s:*]*(?:(?:option|choice)\s+)?)[(*]*"
    r"([A-Z])(?![A-Za-z])(?!(?<=A)\s+(?!(?:because|since|as|and|for|with|in|from|according|due|which)\b)[a-z])"
    r"|(?i:\b(?:option|choice)\s+)[(*]*([A-Z])[)*]*(?=\s+is\s+(?:right|correct|true)\b)"
)
_LISTED = re.compile(r"^\W*([A-Za-z])[.):](?![A-Za-z])[^\n]*$")
_ALONE = re.compile(r"^\W*([A-Za-z])\W*$")


def multiple_choice(*, completion: str, ground_truth: object, **_: object) -> float:
    r"""1.0 if the completion chooses the letter of the ground truth, else 0.0, also where it chooses none.

    A choice is the last `\boxed{B}`, or else the last "the answer is B", "Answer: (B)" or "option B is right", or else
    a text that is one letter, or one line that begins with it as a list does ("B. Cat"). The text is that of the last
    `<answer>...</answer>`, or else the completion.

    Raises:
        ValueError: the ground truth is no letter.

    Example: "It has four legs, so the answer is (B)." is worth 1.0 for the ground truth "B".
    """
    truth = _ALONE.match(str(ground_truth))
    if truth is None:
        raise ValueError(f"the ground truth {ground_truth!r} is not a letter")
    text = answer_of(completion)
    for pattern in (_BOXED, _STATED, _ALONE, _LISTED):
        if found := [*pattern.finditer(text.strip())]:
            chosen = found[-1][found[-1].lastindex or 1]
            return float(chosen.upper() == truth.group(1).upper())
    return 0.0
