"""Several ranks of a module under torchrun, as a test waits for them."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def run_ranks(num_ranks: int, module: str, *arguments: str) -> None:
    """Run `module` to its end, a thread for each rank. Fails with the end of what they say if one of them does."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    done = subprocess.run(
        [*torchrun, "-m", module, *arguments],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
