"""Handwritten digits as chat prompts: 1,797 real scans, each a 56 x 56 PNG.

`train` (1,437 rows) and `held_out` (360) are the callables that `data.train` and `data.held_out` name. The split is
stratified and the same in every run, whatever its seed.
"""

import io
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.types import ChatMessage, MediaPart, TextPart
from learner.types import PromptSample

IMAGE_SIZE = 56  # pixels; 4 x 4 patches of 14, merged 2 x 2: 4 image tokens
# Longer than one block of vLLM's KV cache (32 tokens with the image), so that the samples of a group share it.
QUESTION = "Which digit?"
# A line for each scan: its ink, 8 x 8 numbers from 0 to 16, and the digit.
_FILE = Path(__file__).with_name("digits.csv.gz")
# One scan of so many measures the policy.
_HELD_OUT_EVERY = 5


def train() -> list[PromptSample]:
    """The rows that the policy trains on."""
    return [_sample(int(row)) for row in split()[0]]


def held_out() -> list[PromptSample]:
    """The rows that measure it."""
    return [_sample(int(row)) for row in split()[1]]


@cache
def split() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row numbers of the data set, ascending: train [1437] and held-out [360], each with its share of every digit."""
    by_digit = np.argsort(_scans()[1], kind="stable")
    held_out_rows = by_digit[::_HELD_OUT_EVERY]
    return np.setdiff1d(by_digit, held_out_rows), np.sort(held_out_rows)


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
def _scans() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(ink in 0..16 [1797, 8, 8], labels [1797])."""
    table = np.loadtxt(_FILE, dtype=np.int64, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]
