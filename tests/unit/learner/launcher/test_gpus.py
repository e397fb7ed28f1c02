"""Who gets which GPU of a machine."""

import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from common.config import ConfigError
from learner.config import LearnerConfig, LocalConfig
from learner.launcher.actors import LocalActors
from learner.launcher.gpus import GpuShares, shares_of


def _config(local: dict[str, Any], **trainer: Any) -> LearnerConfig:
    return LearnerConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": "t"},
            "trainer": {"total_steps": 1, "batch_prompts": 1, **trainer},
            "local": local,
        }
    )


@pytest.mark.parametrize(
    ("local", "trainer", "expected"),
    [
        ({"num_actors": 2}, {}, GpuShares(("4",), (("5",), ("6",)))),
        ({"num_actors": 1, "num_ranks": 3}, {}, GpuShares(("4", "5", "6"), (("7",),))),
        (
            {"num_actors": 1, "actor": {"vllm": {"tensor_parallel_size": 2}}},
            {},
            GpuShares(("4",), (("5", "6"),)),
        ),
        ({"num_actors": 4}, {"device": "cpu"}, GpuShares(None, (("4",), ("5",), ("6",), ("7",)))),
        ({"num_actors": 9, "actor": {"engine": "fake"}}, {}, GpuShares(("4",), ())),
        ({"num_actors": 0, "num_ranks": 2}, {}, GpuShares(("4", "5"), ())),
    ],
)
def test_everybody_has_their_own(local: dict[str, Any], trainer: dict[str, Any], expected: GpuShares) -> None:
    assert shares_of(_config(local, **trainer), ("4", "5", "6", "7")) == expected


def test_too_few_are_named() -> None:
    config = _config({"num_actors": 2, "num_ranks": 1, "actor": {"vllm": {"tensor_parallel_size": 2}}})
    with pytest.raises(ConfigError, match="1 ranks and 2 actors of 2 GPUs need 5 GPUs, and there are 4"):
        shares_of(config, ("0", "1", "2", "3"))
    by_gloo = config.model_copy(update={"weights": config.weights.model_copy(update={"backend": "gloo"})})
    assert shares_of(by_gloo, ("0", "1", "2", "3")) == GpuShares()  # it is up to the user then


def test_without_gpus_nobody_is_told_of_any() -> None:
    assert shares_of(_config({"num_actors": 2}), ()) == GpuShares()


def test_actors_see_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = MagicMock()
    started.return_value.pid = 1
    monkeypatch.setattr(subprocess, "Popen", started)
    (tmp_path / "logs").mkdir()
    config = LocalConfig(num_actors=2, base_port=50990)
    for gpus, expected in (((("2", "3"), ("5",)), ["2,3", "5"]), ((), [None, None])):
        started.reset_mock()
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        actors = LocalActors(config, tmp_path, tmp_path, gpus=gpus)
        for actor in actors._actors:
            actors._spawn(actor)
        seen = [call.kwargs["env"].get("CUDA_VISIBLE_DEVICES") for call in started.call_args_list]
        assert seen == expected
        on_cores = "cpu_cores" in (tmp_path / "actor-0.yaml").read_text()
        assert on_cores is not bool(gpus)  # cores are shared out only where they compute
