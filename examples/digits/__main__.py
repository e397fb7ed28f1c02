"""`python -m examples.digits`: what `make demo` runs. A tiny VLM learns to read handwriting from two vLLM actors.

Takes what `outrider` takes, as `--seed 2` or `trainer.total_steps=20`.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from learner.launcher.main import main

if TYPE_CHECKING:
    from learner.config import LearnerConfig

_CONFIG = Path(__file__).with_name("config.yaml")


def _prepare(config: "LearnerConfig", run_dir: Path) -> Path:
    """The warm-started checkpoint of this run, made once."""
    model = run_dir / "model"
    if not model.is_dir():
        from examples.digits.prepare import prepare

        partial = run_dir / ".model.partial"
        prepare(partial, config.seed).rename(model)
    return model


if __name__ == "__main__":
    sys.exit(main(["--config", str(_CONFIG), *sys.argv[1:]], prepare=_prepare))
