"""Faults happen once, where and when they are armed for."""

import os
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.injection import fault as module
from tests.injection.fault import VARIABLE, Fault, Injector, do, moment
from tests.injection.matrix import cells


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "actor.fault"))
    monkeypatch.delenv("RANK", raising=False)  # tests of the learner leave it
    return tmp_path / "actor.fault"


def test_a_fault_happens_once_at_its_phase_and_version(path: Path) -> None:
    injector = Injector()
    assert injector.due("stage") is None
    fault = Fault("stop", "stage", 3, "veth1", 7)
    fault.arm(path)
    found = []
    for version, phase in ((2, "stage"), (3, "open"), (4, "stage"), (4, "stage")):
        injector.version = version
        found.append(injector.due(phase))
    assert found == [None, None, fault, None]
    assert float(moment(path).read_text()) > 0
    fault.arm(path)  # again
    assert not moment(path).exists()


@pytest.mark.parametrize(("kind", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_signals_go_to_the_process_itself(kind: module.Kind, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kill = Mock()
    monkeypatch.setattr(os, "kill", kill)
    do(Fault(kind, "stage", 0, "veth1", 7))
    kill.assert_called_once_with(os.getpid(), number)


def test_every_kind_of_fault_meets_every_victim_in_the_phases_that_it_has() -> None:
    found = {str(cell) for cell in cells()}
    assert len(found) == 17 + 21 + 8
    assert {"actor/stage/corrupt", "rank-0/stage/corrupt", "rank-1/gather/cut"} <= found
    assert not {"actor/gather/kill", "rank-1/commit/kill", "rank-0/open/corrupt"} & found
