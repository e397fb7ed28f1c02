"""`python -m learner.launcher` as a user starts it, in a session of its own, and everything that it leaves behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

ROOT = Path(__file__).resolve().parents[2]
# Inherited by every process that a command starts, however they are related by then.
_VARIABLE = "OUTRIDER_TEST_LAUNCHED"

T = TypeVar("T")


class Launched:
    """One command and all processes of it. Its standard output and error go to files in `directory`."""

    def __init__(self, directory: Path, arguments: Sequence[str], module: str = "learner.launcher") -> None:
        self._mark = uuid.uuid4().hex
        directory.mkdir(parents=True, exist_ok=True)
        name = f"{self._mark[:8]}"
        self._stdout, self._stderr = directory / f"{name}.out", directory / f"{name}.err"
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**os.environ, _VARIABLE: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        """So far."""
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """So far."""
        return self._stderr.read_text(errors="replace")

    def left(self, *words: str) -> dict[int, str]:
        """Processes of this command that live, whoever their parent is; those with all `words` in the command line."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_VARIABLE) == self._mark:
                    command = process.cmdline()
                    if all(word in command for word in words):
                        found[process.pid] = " ".join(command)
        return found

    def pid_of_rank(self, rank: int) -> int:
        """Of the learner."""
        [pid] = [pid for pid in self.left("learner") if psutil.Process(pid).environ().get("RANK") == str(rank)]
        return pid

    def exit_code(self, timeout_s: float) -> int:
        """Wait for the command itself."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:.0f} s; it said:\n{self.said()}") from None

    def until(self, condition: Callable[[], T | None], timeout_s: float, what: str) -> T:
        """Wait until `condition` holds, and return what it says, while the command runs."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert self.process.poll() is None, f"ended before {what}; it said:\n{self.said()}"
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}; it said:\n{self.said()}"
            time.sleep(0.05)
        return value

    def said(self) -> str:
        """The end of what it wrote, for messages."""
        return f"{self.stdout[-3000:]}\n--- standard error\n{self.stderr[-3000:]}"

    def kill(self) -> None:
        """End everything that is left of it at once."""
        while left := self.left():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()


@contextlib.contextmanager
def launching(directory: Path) -> Iterator[Callable[..., Launched]]:
    """A function that starts commands; whatever is left of them at the end is killed."""
    started: list[Launched] = []

    def launch(*arguments: str, module: str = "learner.launcher") -> Launched:
        started.append(Launched(directory, arguments, module))
        return started[-1]

    try:
        yield launch
    finally:
        for launched in started:
            launched.kill()


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody uses; tests of another process look elsewhere."""
    for base in range(20000 + os.getpid() * 100 % 10000, 64000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise AssertionError("no free ports")


def run_dirs(runs_dir: Path) -> list[Path]:
    """The run folders, oldest first."""
    return sorted(path for path in runs_dir.glob("*") if path.is_dir()) if runs_dir.is_dir() else []


def actor_pids(run_dir: Path) -> dict[str, int]:
    """Address to process id, of the actors that the launcher has started."""
    try:
        pids: dict[str, int] = json.loads((run_dir / "actors.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return pids


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are about steps."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if "sequences" in line]


def is_alive(pid: int) -> bool:
    """Whether this process exists and is no zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False
