"""How a process ends."""

import signal
import subprocess
import sys


def test_a_fault_of_native_code_says_where_all_threads_were() -> None:
    code = """
import ctypes, threading
from common.process.lifecycle import tell_faults

def waiting():
    threading.Event().wait()

threading.Thread(target=waiting, daemon=True).start()
tell_faults()
ctypes.string_at(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGSEGV  # whoever started it still sees what it died of
    assert "Fatal Python error: Segmentation fault" in done.stderr
    assert "in string_at" in done.stderr
    assert "in waiting" in done.stderr
