"""Several ranks of a module under torchrun, as a test waits for them."""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from common.process.lifecycle import tell_faults

_ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 300.0
_COLLECTIVE_TIMEOUT_S = 120.0
_TORCHRUN_END_S = 60.0  # it gives its ranks 30


def run_ranks(num_ranks: int, module: str, *arguments: str) -> None:
    """Run `module` to its end, a thread for each rank. Fails with the end of what they say if one of them does."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [*torchrun, "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        with subprocess.Popen(command, cwd=_ROOT, env=environment, stderr=said) as running:
            try:
                code: int | None = running.wait(_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = None
                running.terminate()  # which ends its ranks, and a kill would not
                running.wait(_TORCHRUN_END_S)
        said.seek(0)
        words = said.read()[-10_000:]
    assert code == 0, f"{'no end' if code is None else f'exit code {code}'} of {module}: {words}"


@contextlib.contextmanager
def joined_over_gloo() -> Iterator[tuple[int, int]]:
    """What a rank does within: its rank, and their number. One that dies or is ended by torchrun tells where it was."""
    torch.set_num_threads(1)
    tell_faults()
    faulthandler.register(signal.SIGTERM, chain=True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=_COLLECTIVE_TIMEOUT_S))
    yield dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
