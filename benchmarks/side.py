"""One side of a training benchmark: a process that takes steps when told to, and idles otherwise.

The protocol is one JSON object a line. The process writes `{"ready": facts}` once. For each line `{"steps": k}` it
takes k optimizer steps and answers `{"step_s": [...], "completions": n, "tokens": m}`: seconds of each step,
completions and sampled tokens of all of them. It ends when its standard input does.
"""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side did in one turn."""

    step_s: tuple[float, ...]
    completions: int
    tokens: int

    @property
    def mean_length(self) -> float:
        """Sampled tokens of a completion."""
        return self.tokens / self.completions


class Process:
    """A process that answers one JSON line to each JSON line. Its standard error goes to `log`.

    `facts` is what it said when it was ready.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: variables beside those of this process."""
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        self.facts: dict[str, Any] = self._answer()["ready"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer. Raises `RuntimeError`, with the end of its log, if it ends instead."""
        self.send(request)
        return self.receive()

    def send(self, request: dict[str, Any]) -> None:
        """Ask without waiting for the answer, which `receive` brings."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The answer to what was sent. Raises as `ask`."""
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"a process ended with status {status}; it wrote: {self._log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Side(Process):
    """One side of a training benchmark, see the top of this file."""

    def take(self, steps: int) -> Turn:
        """Let it take `steps` optimizer steps."""
        answer = self.ask({"steps": steps})
        return Turn(tuple(answer["step_s"]), answer["completions"], answer["tokens"])
