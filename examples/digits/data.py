"""The digits of scikit-learn as chat prompts: 1,797 real scans of handwriting, each a 56 x 56 PNG.

`train` (1,437 rows) and `held_out` (360) are the callables that `data.train` and `data.held_out` name. The split is
stratified and the same in every run, whatever its seed.
"""

import io
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from common.types import ChatMessage, MediaPart, TextPart
from examples.digits.model import IMAGE_SIZE
from learner.types import PromptSample

# Longer than one block of vLLM's KV cache (32 tokens with the image), so that the samples of a group share it.
QUESTION = "Which digit?"
NUM_HELD_OUT = 360
_SPLIT_SEED = 0


def train() -> list[PromptSample]:
    """The rows that the policy trains on."""
    return [_sample(int(row)) for row in split()[0]]


def held_out() -> list[PromptSample]:
    """The rows that measure it."""
    return [_sample(int(row)) for row in split()[1]]


@cache
def split() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row numbers of the data set, ascending: train [1437] and held-out [360], each with its share of every digit."""
    labels = _scans()[1]
    rows = np.arange(len(labels))
    train_rows, held_out_rows = train_test_split(
        rows, test_size=NUM_HELD_OUT, stratify=labels, random_state=_SPLIT_SEED
    )
    return np.sort(train_rows), np.sort(held_out_rows)


def png(row: int) -> bytes:
    """The scan as a PNG file: dark ink on white paper, enlarged from 8 x 8 so that it can be looked at."""
    ink = _scans()[0][row] / 16.0
    scan = Image.fromarray(np.round(255 * (1 - ink)).astype(np.uint8))
    file = io.BytesIO()
    scan.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(file, format="PNG")
    return file.getvalue()


def label(row: int) -> str:
    """The digit that was written."""
    return str(_scans()[1][row])


def messages() -> tuple[ChatMessage, ...]:
    """The prompt, the same for every row: the image, then the question."""
    return (ChatMessage("user", (MediaPart(0), TextPart(QUESTION))),)


def _sample(row: int) -> PromptSample:
    return PromptSample(row=row, messages=messages(), images=(png(row),), ground_truth=label(row), data_source="digits")


@cache
def _scans() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(ink in 0..16 [1797, 8, 8], labels [1797])."""
    digits = load_digits()
    return digits.images, digits.target
