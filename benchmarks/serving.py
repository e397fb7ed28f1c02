"""Server processes of benchmarks: each prints one line with " ready on HOST:PORT" once it serves."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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


def vllm_actor(model: Path, log: Path, settings: Mapping[str, object], *arguments: str) -> AbstractContextManager[str]:
    """A standalone actor with the real engine, `settings` of its section `vllm`, and further arguments; its address."""
    options = [f"vllm.{name}={value}" for name, value in settings.items()]
    fixed = ("--model", str(model), "--standalone", "--listen", "127.0.0.1:0")
    return serving("actor", *fixed, *options, *arguments, log=log)
