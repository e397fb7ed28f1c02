"""Server processes of benchmarks: each prints one line with " ready on HOST:PORT" once it serves."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FAKE_ACTOR = ("actor", "--engine", "fake", "--standalone", "--listen", "127.0.0.1:0")


@contextmanager
def serving(module: str, *arguments: str, log: Path) -> Iterator[str]:
    """`python -m module arguments...`; its address. Its standard error goes to `log`."""
    command = [sys.executable, "-m", module, *arguments]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if " ready on " in line), None)
        if line is None:
            raise RuntimeError(f"{module} ended with status {process.wait()}: {log.read_text()[-2000:]}")
        yield line.split(" ready on ")[1].split(": ")[0].strip()
    finally:
        process.terminate()
        process.wait(timeout=30)
