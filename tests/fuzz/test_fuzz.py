"""The fuzzer, for a few seconds: longer runs are `make fuzz`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launched import ROOT

pytest.importorskip("atheris", reason="has no wheel for this platform")


def fuzz(folder: Path, target: str, *arguments: str) -> tuple[int, str]:
    """Exit code, and what libFuzzer tells."""
    command = [sys.executable, "-m", "tests.fuzz", target, "--finds", str(folder), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["generate", "stage", "upload"])
def test_nothing_is_found(target: str, tmp_path: Path) -> None:
    code, told = fuzz(tmp_path, target, "--seconds", "2")
    assert code == 0, told[-3000:]
    assert list(tmp_path.iterdir()) == []
    counts = dict(re.findall(r"^stat::(\w+):\s+(\d+)$", told, re.MULTILINE))
    assert int(counts["number_of_executed_units"]) > 100
    assert int(counts["new_units_added"]) > 10  # it sees coverage, and follows it


@pytest.mark.slow
def test_a_mistake_is_found_and_can_be_run_again(tmp_path: Path) -> None:
    code, told = fuzz(tmp_path, "planted", "--seconds", "50")
    assert code != 0
    assert "RuntimeError: planted" in told
    [find] = tmp_path.iterdir()
    code, told = fuzz(tmp_path, "planted", str(find))
    assert code != 0
    assert "RuntimeError: planted" in told
    assert fuzz(tmp_path, "generate", str(find))[0] == 0
