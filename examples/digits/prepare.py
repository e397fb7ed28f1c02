"""The checkpoint that the demo starts from: the tiny model, warm-started."""

import time
from collections.abc import Callable
from pathlib import Path

from examples.digits.model import build_model
from examples.digits.warm_start import warm_start


def prepare(out_dir: Path, seed: int, report: Callable[[str], None] = print) -> Path:
    """Build the tiny Qwen2.5-VL in `out_dir` and warm-start it; `seed` decides both. Returns `out_dir`."""
    started_at = time.monotonic()
    build_model(out_dir, seed)
    accuracy = warm_start(out_dir, seed, report=report)
    report(f"checkpoint {out_dir}: reads {accuracy:.0%} of the training scans, made in {time.monotonic() - started_at:.0f} s")
    return out_dir
