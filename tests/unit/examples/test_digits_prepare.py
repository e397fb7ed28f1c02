"""The checkpoint of the demo, as it is left for others."""

import os
import stat
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from examples.digits import warm_start
from examples.digits.prepare import prepare


def test_it_can_be_read_by_whom_the_umask_lets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_again(model_dir: Path, seed: int, **_: object) -> float:
        AutoModelForImageTextToText.from_pretrained(model_dir).save_pretrained(model_dir)
        return 0.4

    monkeypatch.setattr(warm_start, "warm_start", save_again)
    before = os.umask(0o022)
    try:
        model = prepare(tmp_path / "model", 0, report=str)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in model.iterdir()}
    assert "model.safetensors" in modes
    assert modes == dict.fromkeys(modes, 0o644)
