"""What is added to rewards before advantages are computed."""

import numpy as np

from common.types import FloatArray, IntArray


def overlong_penalty(lengths: IntArray, max_tokens: int, buffer: int) -> FloatArray:
    """The soft punishment of long answers. DAPO, arXiv 2503.14476, equation 13.

    Args:
        lengths: tokens of each completion, int `[n]`.
        max_tokens: cap of a completion.
        buffer: the last so many tokens below the cap are punished, 1 to `max_tokens`.

    Returns:
        float32 `[n]`: 0 up to `max_tokens - buffer` tokens, then falling to -1 at `max_tokens`.

    Example: with a cap of 10 and a buffer of 4, lengths [6, 7, 10] get [0, -0.25, -1].
    """
    excess = np.asarray(lengths, np.float64) - (max_tokens - buffer)
    return -np.clip(excess / buffer, 0.0, 1.0).astype(np.float32)
