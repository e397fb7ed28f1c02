"""When the warm start stops. The reader is a fake: its accuracies are a list."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.digits import data
from examples.digits import warm_start as module
from examples.digits.warm_start import NUM_FORM_STEPS, NUM_PROBES, PROBE_EVERY, warm_start


class FakeReader:
    """Answers with the next of `accuracies`; its one weight counts nothing."""

    accuracies: list[float]
    measured: list[Tensor]
    saved: list[Path]

    def __init__(self, model_dir: Path) -> None:
        self.model = self

    def parameters(self) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.zeros(1))]

    def accuracy(self, rows: Tensor) -> float:
        self.measured.append(rows)
        return self.accuracies[min(len(self.measured), len(self.accuracies)) - 1]

    def save_pretrained(self, path: Path) -> None:
        self.saved.append(path)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """`any_digit` of each step that was made."""
    made: list[bool] = []

    def step(reader: object, optimizer: object, rows: Tensor, *, any_digit: bool) -> float:
        made.append(any_digit)
        return 1.0

    FakeReader.measured, FakeReader.saved = [], []
    monkeypatch.setattr(module, "DigitReader", FakeReader)
    monkeypatch.setattr(module, "_step", step)
    return made


def test_stops_at_the_first_accuracy_above_the_target(steps: list[bool], tmp_path: Path) -> None:
    FakeReader.accuracies = [0.10, 0.30, 0.35, 0.41, 0.90]
    assert warm_start(tmp_path, 0, target_accuracy=0.35, report=str) == 0.41
    assert steps == [True] * NUM_FORM_STEPS + [False] * 4 * PROBE_EVERY
    assert FakeReader.saved == [tmp_path]
    train = set(data.split()[0].tolist())
    for probes in FakeReader.measured:
        assert len(set(probes.tolist()) & train) == NUM_PROBES  # never a held-out scan


def test_says_so_when_the_target_is_out_of_reach(steps: list[bool], tmp_path: Path) -> None:
    FakeReader.accuracies = [0.10]
    with pytest.raises(RuntimeError, match="35%"):
        warm_start(tmp_path, 0, target_accuracy=0.35, report=str)
    assert FakeReader.saved == []
