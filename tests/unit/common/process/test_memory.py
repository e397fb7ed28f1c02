"""Memory that is used again, seen from a process of its own: what it sets holds for all that come after."""

import subprocess
import sys

_COUNT = """
import resource
from common.process.memory import keep_freed
{begin}
for _ in range(10):
    bytes(range(256)) * 4096
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    first, second = bytes(range(256)) * 4096, bytes(range(256)) * 4096
    del first, second
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(begin: str) -> int:
    """Pages that the kernel gives for 200 blocks of a MiB."""
    command = [sys.executable, "-c", _COUNT.format(begin=begin)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_freed_memory_is_used_again() -> None:
    assert _faults("keep_freed()") < _faults("") / 10
