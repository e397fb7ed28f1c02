"""`python -m learner.torchrun` around a rank that ends: no traceback follows its words, its exit code stays."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launched import ROOT

# Asked to stop, it ends as a learner does.
RANK = """
import os, signal, sys, time

def stop(*_):
    print("learner: stopped", file=sys.stderr, flush=True)
    os._exit(130)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
what = sys.argv[1]
if what == "wait":
    print("started", flush=True)
    time.sleep(60)
elif what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
else:
    sys.exit(int(what))
"""


def start(tmp_path: Path, what: str) -> "subprocess.Popen[str]":
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "learner.torchrun", "--standalone", str(tmp_path / "rank.py"), what]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("what", "code"), [("1", 1), ("2", 2), ("killed", 137)])
def test_a_rank_that_fails_gives_its_exit_code(tmp_path: Path, what: str, code: int) -> None:
    torchrun = start(tmp_path, what)
    _, stderr = torchrun.communicate(timeout=60)
    assert (torchrun.returncode, "Traceback" in stderr) == (code, False), stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_that_was_asked_for_is_no_failure_of_torchruns(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    torchrun = start(tmp_path, "wait")
    assert torchrun.stdout is not None
    assert torchrun.stdout.readline() == "started\n"
    torchrun.send_signal(number)
    _, stderr = torchrun.communicate(timeout=60)
    assert (torchrun.returncode, "Traceback" in stderr) == (code, False), stderr
    assert "learner: stopped" in stderr
