"""The digits as prompts, against the file that they come from."""

import csv
import gzip
import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.types import ChatMessage, MediaPart, TextPart
from examples.digits import data
from examples.digits.reward import exact_match
from learner.rewards.load import load_reward
from tests.helpers.fakes import make_task

FILE = Path(data.__file__).with_name("digits.csv.gz")


@pytest.fixture(scope="module")
def lines() -> list[list[int]]:
    """64 numbers and the digit, for each scan."""
    with gzip.open(FILE, "rt") as file:
        return [[int(number) for number in line] for line in csv.reader(file)]


def test_the_file_is_what_others_train_on() -> None:
    """As scikit-learn ships it, to the byte."""
    checksum = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == checksum


def test_split_covers_every_scan_once() -> None:
    train, held_out = data.split()
    assert (len(train), len(held_out)) == (1437, 360)
    assert sorted([*train, *held_out]) == list(range(1797))


def test_split_is_stratified(lines: list[list[int]]) -> None:
    labels = [line[-1] for line in lines]
    held_out = Counter(labels[row] for row in data.split()[1])
    for digit, count in Counter(labels).items():
        assert held_out[digit] == pytest.approx(count * 360 / 1797, abs=1)


def test_samples_carry_scan_and_label(lines: list[list[int]]) -> None:
    samples = data.held_out()
    assert [sample.row for sample in samples] == data.split()[1].tolist()
    for sample in samples[:20]:
        *ink, digit = lines[sample.row]
        assert sample.ground_truth == str(digit)
        assert sample.messages == (ChatMessage("user", (MediaPart(0), TextPart("Which digit?"))),)
        (png,) = sample.images
        image = Image.open(io.BytesIO(png))
        assert (image.format, image.size) == ("PNG", (56, 56))
        # Middles of the 7 x 7 blocks: the scan's own pixels, dark where there is ink.
        pixels = np.asarray(image.convert("L"), dtype=np.float64)[3::7, 3::7]
        np.testing.assert_allclose(pixels, 255 * (1 - np.reshape(ink, (8, 8)) / 16), atol=1)


def test_samples_are_the_same_bytes_each_time() -> None:
    assert data.train()[:5] == data.train()[:5]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("7", 1.0), (" 7\n", 1.0), ("1", 0.0), ("77", 0.0), ("7 1", 0.0), ("", 0.0), ("seven", 0.0)],
)
def test_reward(completion: str, reward: float) -> None:
    assert exact_match(completion=completion, ground_truth="7") == reward


def test_learner_finds_the_reward() -> None:
    reward = load_reward("examples.digits.reward:exact_match")
    assert reward(make_task("3", "4", ground_truth="3")) == [1.0, 0.0]
