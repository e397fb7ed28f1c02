"""An actor process whose unpicklers are watched."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.audit.sitecustomize import LOG_VARIABLE
from tests.helpers.launched import ROOT

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class WatchedActor:
    """`pid` is the process with the socket."""

    address: str
    pid: int
    _log: Path
    _serving_from: int

    def unpickled(self, *, while_loading: bool = False) -> list[dict[str, Any]]:
        """What has been looked up, in the actor and its child processes, since it serves, or before that."""
        data = self._log.read_bytes()
        part = data[: self._serving_from] if while_loading else data[self._serving_from :]
        return [json.loads(line) for line in part.splitlines()]


@contextlib.contextmanager
def watched_actor(folder: Path, *arguments: str, module: str = "actor") -> Iterator[WatchedActor]:
    """Start one, ready to serve."""
    log, errors = folder / "audit.jsonl", folder / "errors.log"
    log.touch()
    paths = [str(_HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, LOG_VARIABLE: str(log), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", module, "--standalone", "--listen", "127.0.0.1:0", *arguments]
    with errors.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=file, text=True, stdin=subprocess.DEVNULL
        )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if " ready on " in line), None)
        assert line is not None, errors.read_text()[-3000:]
        address = line.split(" ready on ")[1].split(": ")[0]
        yield WatchedActor(address, process.pid, log, log.stat().st_size)
    finally:
        process.terminate()
        process.wait(timeout=30)
