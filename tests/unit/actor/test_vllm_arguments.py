"""How vLLM is started, without an engine."""

import os
from pathlib import Path
from typing import Any

import pytest

from actor.config import VllmConfig
from examples.digits.model import build_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What starting an engine changes is put back: variables, and the parts of vLLM that the plug-in replaces."""
    import vllm.platforms  # noqa: F401 - it sets some

    from actor.engine_vllm import plugin

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.delitem(os.environ, "VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    monkeypatch.setattr(plugin, "register", lambda: None)


def _started(monkeypatch: pytest.MonkeyPatch, model: Path, *, is_cpu: bool) -> Any:
    """The arguments, as they are when vLLM makes its configuration of them."""
    from vllm import platforms
    from vllm.engine.arg_utils import AsyncEngineArgs

    from actor.engine_vllm.arguments import engine_config

    monkeypatch.setattr(type(platforms.current_platform), "is_cpu", lambda _self: is_cpu)
    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", lambda self, _context: self)
    return engine_config(model, VllmConfig(), takes_updates=False)


@pytest.mark.parametrize("is_cpu", [True, False])
def test_processes_of_vllm_are_spawned_and_load_the_plug_in(
    monkeypatch: pytest.MonkeyPatch, model: Path, is_cpu: bool
) -> None:
    """Forked ones would outlive an actor that is killed. On CPUs vLLM spawns, but only says so later."""
    _started(monkeypatch, model, is_cpu=is_cpu)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["OUTRIDER_ACTOR_PID"] == str(os.getpid())


@pytest.mark.parametrize("is_cpu", [True, False])
def test_a_gpu_keeps_room_for_the_vision_tower(monkeypatch: pytest.MonkeyPatch, model: Path, is_cpu: bool) -> None:
    arguments = _started(monkeypatch, model, is_cpu=is_cpu)
    assert arguments.skip_mm_profiling is is_cpu
