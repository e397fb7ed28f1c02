"""The command line of `make demo`."""

from pathlib import Path

import pytest

from common.config import load_config
from examples.digits import __main__ as demo
from learner.config import LearnerConfig
from learner.launcher.main import parse


@pytest.mark.parametrize(
    ("gpus", "own", "limit"),
    [((), [], 1e-4), (("0",), [], 1e-2), (("0",), ["trainer.max_parity_diff=1e-3", "--seed", "2"], 1e-3)],
)
def test_the_limit_of_parity_is_that_of_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: tuple[str, ...], own: list[str], limit: float
) -> None:
    """On a GPU vLLM's attention rounds float32 to TF32, which the limit of CPUs takes for another model."""
    monkeypatch.setattr(demo, "_DEVICES", tmp_path)
    for index in gpus:
        (tmp_path / f"nvidia{index}").touch()
    options = parse(demo.arguments(own))
    assert load_config(LearnerConfig, options.config, options.overrides).trainer.max_parity_diff == limit
