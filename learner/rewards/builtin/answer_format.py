"""The reward 1 for a completion that thinks first and then answers, each in its tags."""

import re

_TAG = re.compile(r"(<think>|</think>|<answer>|</answer>)")
_WANTED = ["<think>", "</think>", "<answer>", "</answer>"]


def answer_format(*, completion: str, **_: object) -> float:
    r"""1.0 if the completion is `<think>...</think><answer>...</answer>`, else 0.0.

    Each tag comes once and in this order, something is written in both, and nothing but white space is around and
    between them. Whether the answer is right is for another reward to say.

    Example: "<think>3 + 4</think>\n<answer>7</answer>" is worth 1.0, "<answer>7</answer>" 0.0.
    """
    before, *rest = _TAG.split(completion)
    tags, texts = rest[::2], rest[1::2]
    if tags != _WANTED:
        return 0.0
    thought, between, answer, after = (text.strip() for text in texts)
    return float(bool(thought and answer) and not (before.strip() or between or after))
