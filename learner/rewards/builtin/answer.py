"""The part of a completion that is the answer, where it says so."""

import re

# From the last opening tag before a closing one: whoever thinks aloud may name the tag before using it.
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def answer_of(completion: str) -> str:
    """The text of the last `<answer>...</answer>`; without one, the whole completion.

    Example: "<think>3 + 4</think><answer>7</answer>" has the answer "7".
    """
    answers: list[str] = _ANSWER.findall(completion)
    return answers[-1] if answers else completion
