"""A fault that a process does to itself, at a phase of a weight update, from a policy version on.

    harness: Fault --file--> Injector in the process: at(phase, version) --does it, and writes down when--> harness

The process has the file's path in its environment; a rank of the learner adds its number. The file may come at any
time: a fault is armed by writing it, and happens once. Nothing of this is in the product: `tests.injection.hooks` wraps
its methods from outside.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tests.manifests.runner.sandbox import CARD

VARIABLE = "OUTRIDER_FAULT"

Phase = Literal["gather", "open", "stage", "commit", "between"]
Kind = Literal["kill", "stop", "cut", "slow", "corrupt"]

# At this rate an update of the tiny model (2.5 MB) takes longer than the learner waits for one.
SLOW = ("tbf", "rate", "256kbit", "burst", "32kb", "latency", "400ms")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is to happen: `kind`, in `phase` of the first update to `version` or a later one.

    `link` is the far end of the process's network card, in the network namespace of the process `far_pid`.
    """

    kind: Kind
    phase: Phase
    version: int
    link: str
    far_pid: int

    def arm(self, path: Path) -> None:
        """Have the process whose file this is do it."""
        moment(path).unlink(missing_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self)))
        draft.rename(path)


def of_rank(path: Path, rank: str | None) -> Path:
    """The file for this rank among the processes that have the path; None: the only process."""
    return path if rank is None else path.with_suffix(f".{rank}.fault")


def moment(path: Path) -> Path:
    """Where a process writes down when it did what `path` said: seconds since the epoch."""
    return path.with_suffix(".moment")


class Injector:
    """In the process that a fault is meant for."""

    def __init__(self) -> None:
        self._path = of_rank(Path(os.environ[VARIABLE]), os.environ.get("RANK"))
        self.version = 0
        """Of the update that is under way, for phases that do not know it."""

    def due(self, phase: Phase) -> Fault | None:
        """The fault that is to happen now, if any; it is written down as done."""
        if not self._path.exists():
            return None
        fault = Fault(**json.loads(self._path.read_text()))
        if fault.phase != phase or self.version < fault.version:
            return None
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
            draft = self._path.with_suffix(".draft")
            draft.write_text(str(time.time()))
            draft.rename(moment(self._path))
            return fault
        return None  # another thread was first

    def at(self, phase: Phase) -> None:
        """Do what is due."""
        fault = self.due(phase)
        if fault is not None:
            do(fault)


def do(fault: Fault) -> None:
    """To this very process. A corrupt bucket is up to whoever has the bucket."""
    match fault.kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "cut":
            set_link(fault, "down")
        case "slow":
            _far(fault, "tc", "qdisc", "replace", "dev", fault.link, "root", *SLOW)
            _run("tc", "qdisc", "replace", "dev", CARD, "root", *SLOW)


def set_link(fault: Fault, state: Literal["up", "down"]) -> None:
    """Pull the cable at its far end, or plug it in again."""
    _far(fault, "ip", "link", "set", fault.link, state)


def _far(fault: Fault, *command: str) -> None:
    _run("nsenter", f"--net=/proc/{fault.far_pid}/ns/net", *command)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
