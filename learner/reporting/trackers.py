"""Trackers: the numbers of metrics.jsonl also in TensorBoard, trackio or wandb.

| tracker | where | a resumed run goes on |
|---|---|---|
| `tensorboard` | `tensorboard/` in the run folder | there, without what came after its checkpoint |
| `trackio` | trackio's own database, or its space | under the name of the run folder |
| `wandb` | wandb's server | under the id in the file `tracker-id` of the run folder |

Their packages are imported where they are asked for. A tracker that fails is left out: training goes on without it.
"""

import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import ConfigError
from common.log import get_logger
from common.process.threads import run_in_thread
from learner.config import LearnerConfig
from learner.reporting.json_lines import plain
from learner.storage.run_folder import write_whole

log = get_logger(__name__)

# What a tracker may take to send the rest.
_CLOSE_S = 30.0

# What takes the numbers of a step, and what ends it.
Tracker = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]


def check_trackers(names: Sequence[str]) -> None:
    """Whether their packages are there. Raises ConfigError."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"trackers: {name} is not installed; pip install -e '.[{name}]'")


class Trackers:
    """Those of one run, in the thread that calls.

    Args:
        config: of the run; its `trackers` are opened.
        run_dir: gives the run its name.
        version: with which this process begins.
        notify: told in one line of a tracker that fails.
    """

    def __init__(self, config: LearnerConfig, run_dir: Path, version: int, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self._open: dict[str, Tracker] = {}
        for name in config.trackers:
            self._try(name, self._begin, name, config, run_dir, version)

    def log(self, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        found = numbers(plain(values))
        step = int(found.pop("step"))
        for name, (write, _) in list(self._open.items()):
            self._try(name, write, step, found)

    def close(self) -> None:
        """End them; what they hold back is written."""
        for name, (_, end) in list(self._open.items()):
            self._try(name, _in_time, end)

    def _begin(self, name: str, config: LearnerConfig, run_dir: Path, version: int) -> None:
        self._open[name] = _OPEN[name](config, run_dir, version)

    def _try(self, name: str, call: Callable[..., None], *args: object) -> None:
        try:
            call(*args)
        except Exception as error:  # whatever it is: a run is worth more than its pictures
            log.warning("a tracker failed", tracker=name, exc_info=error)
            self._open.pop(name, None)
            said = " ".join(str(error).split())
            self._notify(f"{name} failed and gets nothing more of this run: {type(error).__name__}: {said}")


def _in_time(end: Callable[[], None]) -> None:
    try:
        run_in_thread(end, "close-tracker").result(_CLOSE_S)
    except TimeoutError:
        raise TimeoutError(f"it did not end within {_CLOSE_S:g} s") from None


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of plain values, those of dictionaries as `name/key`."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{key}"] = float(value)
    return found


def _tensorboard(config: LearnerConfig, run_dir: Path, version: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=version + 1 if version else 0, flush_secs=10)
    writer.add_text("config", f"```\n{config.model_dump_json(indent=2)}\n```")

    def write(step: int, found: dict[str, float]) -> None:
        for name, value in found.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _trackio(config: LearnerConfig, run_dir: Path, _version: int) -> Tracker:
    import trackio

    run = trackio.init(config.name, name=run_dir.name, resume="allow", config=config.model_dump(mode="json"))
    return lambda step, found: run.log(found, step=step), run.finish


def _wandb(config: LearnerConfig, run_dir: Path, _version: int) -> Tracker:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", config.name),
        name=run_dir.name,
        id=_run_id(run_dir),
        resume="allow",
        dir=run_dir,
        config=config.model_dump(mode="json"),
    )
    run.define_metric("*", step_metric="step")  # its own steps could not go back to those of a checkpoint
    return lambda step, found: run.log({"step": step, **found}), run.finish


_OPEN = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}


def _run_id(run_dir: Path) -> str:
    """One for all learners of a run."""
    path = run_dir / "tracker-id"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()
