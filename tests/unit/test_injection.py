"""Faults happen once, where and when they are armed for."""

import fnmatch
import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from safetensors.numpy import save_file

from actor.config import ActorConfig
from actor.process import ActorProcess
from common.errors import NotStaged
from common.types import VersionSpan
from tests.helpers.digits_engine import DigitsPrompt
from tests.injection import fault as module
from tests.injection.actor import PROMPT, loaded_engine
from tests.injection.fault import VARIABLE, Fault, Injector, do, moment
from tests.injection.hooks import compared
from tests.injection.matrix import cells
from tests.injection.setups import VLLM


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


def test_the_sample_with_vllm_has_every_kind_while_weights_move_and_both_ends() -> None:
    found = {str(cell) for cell in cells() if any(fnmatch.fnmatch(str(cell), pattern) for pattern in VLLM.cells)}
    kinds = ("kill", "stop", "cut", "slow", "corrupt")
    assert found == {*(f"actor/stage/{kind}" for kind in kinds), "actor/commit/kill", "rank-0/stage/kill"}


async def test_an_actor_does_the_fault_to_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = path.parent / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({}, model / "model.safetensors")
    (model / PROMPT).write_text(json.dumps(asdict(DigitsPrompt((5, 6, 7), (6, 8)))))
    reserved = Mock(getsockname=lambda: ("127.0.0.1", 50051))
    engine = loaded_engine(ActorProcess(ActorConfig(model=model, engine="fake"), reserved))
    kill = Mock()
    monkeypatch.setattr(os, "kill", kill)
    Fault("kill", "commit", 0, "veth1", 7).arm(path)
    with pytest.raises(NotStaged):
        await engine.commit(1)
    kill.assert_called_once_with(os.getpid(), signal.SIGKILL)


def test_tokens_of_the_policy_that_was_trained_count_for_the_actor_that_sampled_them() -> None:
    def group(actor_id: str, *spans: VersionSpan) -> SimpleNamespace:
        return SimpleNamespace(
            prompt=SimpleNamespace(actor_id=actor_id), completions=[SimpleNamespace(version_spans=spans)] * 2
        )

    groups = [group("one", VersionSpan(6, 0, 3), VersionSpan(7, 3, 5)), group("two", VersionSpan(6, 0, 4))]
    stats = SimpleNamespace(parity_max_abs_diff=2e-7, parity_tokens=4)
    assert compared(8, groups, stats) == {"step": 8, "max_abs_diff": 2e-7, "num_tokens": 4, "tokens": {"one": 4}}
