"""Actors that start in a moment: `python -m actor`, forked from a process that has imported all that it needs.

That process, multiprocessing's forkserver, has one thread and nothing of gRPC but its code: nothing is lost in a fork.
This module imports no torch: the forkserver is begun before the learner's own imports.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from actor.__main__ import main

_PRELOADED = ("actor.process", "actor.engine_fake.engine", "actor.weights.transfer", __name__)
# From SIGKILL to the end of a process, on a busy machine.
_END_S = 30.0
# An actor ends by itself if whoever should end it was killed.
_IDLE_EXIT_S = 60
# In the log of an actor.
_SERVING = '"event": "serving"'
# multiprocessing's books are not for several threads.
_lock = threading.Lock()


class ActorEnded(Exception):  # noqa: N818 - says what happened
    """An actor ended that nobody had killed, or not as it was asked to."""


class Actor:
    """An address, and the processes that come and go there, one at a time."""

    def __init__(self, address: str, name: str, folder: Path, settings: Sequence[str]) -> None:
        """The processes write their logs to `folder`; `settings` are keys of their configuration, as `key=value`."""
        self.address = address
        self.num_started = 0
        self._name = name
        self._folder = folder
        self._arguments = ("--engine", "fake", "--listen", address, f"idle_exit_s={_IDLE_EXIT_S}", *settings)
        self._process: ForkServerProcess | None = None

    def start(self) -> None:
        """The next process."""
        with _lock:
            self.num_started += 1
            self._process = ForkServerProcess(target=_serve, args=(self._arguments, self._log))
            self._process.start()

    def kill(self) -> None:
        """SIGKILL to the process, if there is one. Raises ActorEnded if it is not that what has ended it."""
        with _lock:
            process, self._process = self._process, None
            if process is None:
                return
            if process.exitcode is None:
                process.kill()
                process.join(_END_S)
            exitcode = process.exitcode
            process.close()
        if exitcode != -signal.SIGKILL:
            raise ActorEnded(self._ended(exitcode))

    def stop(self) -> None:
        """SIGSTOP to the process."""
        self._signal(signal.SIGSTOP)

    def ask_to_end(self) -> None:
        """SIGTERM to the process."""
        self._signal(signal.SIGTERM)

    def wait(self) -> None:
        """Until the process that was asked to has ended. Raises ActorEnded if it did not end well."""
        while (exitcode := self._exitcode()) is None:
            time.sleep(0.02)
        if exitcode:
            raise ActorEnded(self._ended(exitcode))
        with _lock:
            assert self._process is not None
            self._process.close()
            self._process = None

    @property
    def serves(self) -> bool:
        """Whether the process has come to serve a version."""
        return self._log.exists() and _SERVING in self._log.read_text()

    def _signal(self, number: signal.Signals) -> None:
        with _lock:
            assert self._process is not None
            assert self._process.pid is not None
            os.kill(self._process.pid, number)

    def _exitcode(self) -> int | None:
        with _lock:
            assert self._process is not None
            return self._process.exitcode

    def _ended(self, exitcode: int | None) -> str:
        said = self._log.read_text(errors="replace").splitlines()[-1:]
        return f"{self._name} at {self.address} ended by itself with {exitcode}: {''.join(said)}"

    @property
    def _log(self) -> Path:
        return self._folder / f"{self._name}.{self.num_started}.log"


def preload() -> None:
    """Begin with the imports, in the process that all actors are forked from."""
    forkserver.set_forkserver_preload([*_PRELOADED])
    forkserver.ensure_running()


@contextmanager
def actors_at(addresses: Sequence[str], folder: Path, settings: Sequence[str]) -> Iterator[list[Actor]]:
    """An actor for each address, not started yet; those that are up at the end of the block are killed."""
    actors = [Actor(address, f"actor-{i}", folder, settings) for i, address in enumerate(addresses)]
    with ExitStack() as stack:
        for actor in actors:
            stack.callback(actor.kill)
        yield actors


def served_versions(folder: Path) -> Mapping[str, set[int]]:
    """Which versions each actor has served, by its id, as the actors themselves have logged it."""
    served: dict[str, set[int]] = {}
    for path in folder.glob("actor-*.log"):
        actor_id, versions = "", set()
        for line in path.read_text().splitlines():
            if line.startswith("actor ") and " ready on " in line:
                actor_id = line.split()[1]
            elif _SERVING in line:
                versions.add(json.loads(line)["policy_version"])
        if actor_id:
            served[actor_id] = versions
    return served


def _serve(arguments: Sequence[str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    sys.exit(main([*arguments]))
