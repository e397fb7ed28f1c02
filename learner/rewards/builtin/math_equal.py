"""The reward 1 for an answer that is mathematically the right one, however it is written."""

import logging
import re

from common.config import ConfigError
from learner.rewards.builtin.answer import answer_of

try:
    import math_verify
except ImportError:
    raise ConfigError("reward: math_equal needs the package math-verify; pip install -e '.[math]'") from None

# It would warn that its own alarms are off. They fire in main threads only, and not inside a long call in C; here a
# comparison that hangs ends with its process, after reward.timeout_s.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[")


def math_equal(*, completion: str, ground_truth: object, **_: object) -> float:
    r"""1.0 if the answer equals the ground truth, as math-verify understands both, else 0.0.

    The answer is the last formula (`\boxed{}`, `$...$`) or number in the last `<answer>...</answer>`, or else in the
    completion; without one it is worth 0. The ground truth is LaTeX, with or without dollars.

    Raises:
        ValueError: the ground truth is no mathematics.

    Example: "so it is \boxed{0.5}" and "$\frac{2}{4}$" are worth 1.0 for the ground truth "1/2".
    """
    text = str(ground_truth)
    truth = math_verify.parse(text if _MARKED.search(text) else f"${text}$", parsing_timeout=None)
    if not truth:
        raise ValueError(f"the ground truth {ground_truth!r} is no mathematics that math-verify can read")
    answer = math_verify.parse(answer_of(completion), parsing_timeout=None)
    return float(math_verify.verify(truth, answer, timeout_seconds=None))
