"""The digits as prompts, against scikit-learn's own arrays."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from common.types import ChatMessage, MediaPart, TextPart
from examples.digits import data
from examples.digits.reward import exact_match
from learner.rewards.load import load_reward
from tests.fakes import make_task


def test_split_covers_every_scan_once() -> None:
    train, held_out = data.split()
    assert (len(train), len(held_out)) == (1437, 360)
    assert sorted([*train, *held_out]) == list(range(1797))


def test_split_is_stratified() -> None:
    labels = load_digits().target
    held_out = Counter(labels[data.split()[1]].tolist())
    for digit, count in Counter(labels.tolist()).items():
        assert held_out[digit] == pytest.approx(count * 360 / 1797, abs=1)


def test_samples_carry_scan_and_label() -> None:
    digits = load_digits()
    samples = data.held_out()
    assert [sample.row for sample in samples] == data.split()[1].tolist()
    for sample in samples[:20]:
        assert sample.ground_truth == str(digits.target[sample.row])
        assert sample.messages == (ChatMessage("user", (MediaPart(0), TextPart("Which digit?"))),)
        (png,) = sample.images
        image = Image.open(io.BytesIO(png))
        assert (image.format, image.size) == ("PNG", (56, 56))
        # Middles of the 7 x 7 blocks: the scan's own pixels, dark where there is ink.
        pixels = np.asarray(image.convert("L"), dtype=np.float64)[3::7, 3::7]
        np.testing.assert_allclose(pixels, 255 * (1 - digits.images[sample.row] / 16), atol=1)


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
