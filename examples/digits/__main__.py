"""`python -m examples.digits`: what `make demo` runs. A tiny VLM learns to read handwriting from two vLLM actors.

Takes what `outrider` takes, as `--seed 2` or `trainer.total_steps=20`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from learner.launcher.main import main

if TYPE_CHECKING:
    from learner.config import LearnerConfig

_DEVICES = Path("/dev")
_CONFIG = Path(__file__).with_name("config.yaml")
# Of the limit in the configuration, which is for CPUs: vLLM's attention on a GPU rounds float32 to TF32.
_ON_GPUS = ("trainer.max_parity_diff=1e-2",)


def arguments(own: Sequence[str]) -> list[str]:
    """Of `outrider`: the demo's, and behind them `own`, which count for more."""
    has_gpus = any(_DEVICES.glob("nvidia[0-9]*"))  # as `learner.launcher.gpus`, which `--help` need not load
    return ["--config", str(_CONFIG), *(_ON_GPUS if has_gpus else ()), *own]


def _prepare(config: "LearnerConfig", run_dir: Path) -> Path:
    """The warm-started checkpoint of this run, made once."""
    model = run_dir / "model"
    if not model.is_dir():
        from examples.digits.prepare import prepare

        partial = run_dir / ".model.partial"
        prepare(partial, config.seed).rename(model)
    return model


if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:]), prepare=_prepare))
