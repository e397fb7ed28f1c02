import os

import pytest

from actor.config import VllmConfig
from actor.engine_vllm.arguments import set_up_cpus


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OUTRIDER_CPU_CORES", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_as_many_threads_as_there_are_cores_where_nobody_says_less(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_up(VllmConfig())
    assert os.environ["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    _set_up(VllmConfig())
    assert os.environ["OMP_NUM_THREADS"] == "1000"


def test_named_cores_decide_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    _set_up(VllmConfig(cpu_cores="0-2"))
    assert os.environ["OMP_NUM_THREADS"] == "3"


def _set_up(config: VllmConfig) -> None:
    assert set_up_cpus(config) == "uni"
