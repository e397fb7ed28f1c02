"""What TRL's sides share: model and rows from a folder, a trainer that takes steps when told to, common settings.

Runs in the peers' environment, where Outrider is not installed. A side speaks one JSON object a line on its standard
output, see `benchmarks.side`; everything else goes to standard error. Nothing of TRL is imported before `load`, which
makes torchvision importable first.
"""

import importlib.util
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what libraries print must not mix with the answers


def load(folder: Path, shim: str) -> tuple[Any, Any, Any]:
    """Rows, processor and model of `folder`; `shim` is the path of `common/torchvision_ops.py`."""
    _load_shim(shim)
    import torch  # torchvision's operators come first
    from datasets import load_dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor

    rows = load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    return rows, AutoProcessor.from_pretrained(folder / "model"), model


def settings(**own: Any) -> Any:
    """A `GRPOConfig` for steps on a CPU without end, saving and logging nothing; `own` are a side's own fields."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        lr_scheduler_type="constant",
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        max_steps=1_000_000,
        logging_steps=1_000_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **own,
    )


def gate(begin: Callable[[], None], answer: Callable[[], dict[str, Any]]) -> Any:
    """A callback that waits for the next turn before a step, when the last turn's steps are done.

    `begin` is called when a turn begins; `answer` says, at its end, what is told beside the seconds of its steps.
    """
    from transformers import TrainerCallback

    class Gate(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.left = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.left == 0:
                line = sys.stdin.readline()
                self.left = json.loads(line)["steps"] if line.strip() else -1
                if self.left < 0:
                    os._exit(0)
                begin()
                self.ends = [time.perf_counter()]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ends.append(time.perf_counter())
            self.left -= 1
            if self.left == 0:
                tell({"step_s": [end - start for start, end in itertools.pairwise(self.ends)]} | answer())

    return Gate()


def tell(what: dict[str, Any]) -> None:
    """One line to whoever started this process."""
    print(json.dumps(what), file=_ANSWERS)


def _load_shim(path: str) -> None:
    """Make torchvision importable, as Outrider does for itself (see the shim's own docstring)."""
    spec = importlib.util.spec_from_file_location("torchvision_ops", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the operators live as long as the module does
    spec.loader.exec_module(module)
    module.install()
