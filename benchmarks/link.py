"""A slow link on this machine: a module of benchmarks in a network namespace whose loopback lets so much through.

Needs what `unshare --net` needs, and `tc`.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import say

_SET_UP = "ip link set lo up && tc qdisc add dev lo root tbf rate {rate} burst 4mb latency 200ms"


def run_behind(rate: str, module: str, arguments: Sequence[str]) -> dict[str, Any] | None:
    """Run `python -m module` behind a link of this rate, as `tc` writes it; the JSON object of its last line.

    None, said aloud, where such a link is not permitted.
    """
    if not _is_permitted():
        say(f"what needs a link of {rate} is left out: no network namespaces here, or no tc")
        return None
    python = shlex.join([sys.executable, "-m", module, *arguments])
    command = ["unshare", "--net", "sh", "-c", f"{_SET_UP.format(rate=rate)} && exec {python}"]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            if not last.startswith("{"):
                print(line, end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"{module} ended with status {process.returncode} behind a link of {rate}")
    answer: dict[str, Any] = json.loads(last)
    return answer


def _is_permitted() -> bool:
    """Whether this process may make such a link."""
    if shutil.which("tc") is None or shutil.which("unshare") is None:
        return False
    command = ["unshare", "--net", "sh", "-c", _SET_UP.format(rate="1gbit")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
