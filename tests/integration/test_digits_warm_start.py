"""The demo's starting point, really trained: mostly wrong, right in form, and with every digit in play."""

from pathlib import Path

import torch

from examples.digits import data
from examples.digits.model import TOKEN_IDS
from examples.digits.prepare import prepare
from examples.digits.warm_start import DigitReader, labels_of


def test_leaves_reinforcement_learning_most_of_the_work(tmp_path: Path) -> None:
    reader = DigitReader(prepare(tmp_path / "model", seed=0))
    rows = torch.from_numpy(data.split()[1])
    assert 0.15 < reader.accuracy(rows) < 0.5  # chance is 0.1
    labels = labels_of(rows)
    with torch.no_grad():
        probabilities = reader.logits(rows, labels).softmax(dim=-1)
    digits = probabilities[:, 0][:, reader.digit_ids]
    assert digits.sum(dim=-1).mean() > 0.7
    assert probabilities[:, 1, TOKEN_IDS["<|im_end|>"]].mean() > 0.9
    # Each digit is sampled for its own scans: 16 samples with 3 % find it in 4 of 10 groups.
    right = digits.gather(1, labels[:, None])[:, 0]
    assert min(right[labels == digit].mean() for digit in range(10)) > 0.03
