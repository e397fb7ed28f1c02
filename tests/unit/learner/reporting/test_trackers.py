"""Trackers: the numbers of a run elsewhere, over resumes, and never at the run's expense."""

import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError
from learner.config import LearnerConfig
from learner.reporting.trackers import Trackers, check_trackers, numbers

STEP = {
    "step": 1,
    "reward": 0.5,
    "mismatch_kl": None,
    "skipped": False,
    "reward_parts": {"right": 0.25},
    "sequences": [0, 1],
}
NUMBERS = {"step": 1.0, "reward": 0.5, "skipped": 0.0, "reward_parts/right": 0.25}


def make_config(*trackers: str) -> LearnerConfig:
    return LearnerConfig.model_validate(
        {
            "name": "charts",
            "model": {"path": "m"},
            "data": {"train": "t"},
            "trainer": {"total_steps": 9, "batch_prompts": 1},
            "trackers": trackers,
        }
    )


class FakeService:
    """wandb and trackio, as far as they are used."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int | None]] = []
        self.num_finished = 0
        self.error: Exception | None = None

    def init(self, project: str, **options: Any) -> "FakeService":
        self.inits.append({"project": project, **options})
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        if self.error is not None:
            raise self.error
        self.logged.append((values, step))

    def finish(self) -> None:
        self.num_finished += 1


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> FakeService:
    service = FakeService()
    module = types.ModuleType(name)
    module.init = service.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return service


def test_the_numbers_of_a_line() -> None:
    assert numbers(STEP) == NUMBERS


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    service = install(monkeypatch, name)
    for version in (0, 1):
        trackers = Trackers(make_config(name), tmp_path, version, pytest.fail)
        trackers.log(STEP)
        trackers.close()
    without_step = {key: value for key, value in NUMBERS.items() if key != "step"}
    expected = (NUMBERS, None) if name == "wandb" else (without_step, 1)
    assert (service.logged, service.num_finished) == ([expected] * 2, 2)
    first, second = service.inits
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("charts", tmp_path.name, "allow")
    assert first["config"]["trainer"]["total_steps"] == 9
    if name == "wandb":
        other = tmp_path / "other"
        other.mkdir()
        Trackers(make_config(name), other, 0, pytest.fail)
        assert service.inits[-1]["id"] != first["id"]


def test_one_that_fails_is_said_once_and_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken, well = install(monkeypatch, "wandb"), install(monkeypatch, "trackio")
    broken.error = OSError("the server\nis gone")
    lines: list[str] = []
    trackers = Trackers(make_config("wandb", "trackio"), tmp_path, 0, lines.append)
    trackers.log(STEP)
    trackers.log(STEP)
    trackers.close()
    assert lines == ["wandb failed and gets nothing more of this run: OSError: the server is gone"]
    assert (broken.num_finished, len(well.logged), well.num_finished) == (0, 2, 1)


def test_one_that_does_not_open_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    lines: list[str] = []
    trackers = Trackers(make_config("wandb"), tmp_path, 0, lines.append)
    trackers.log(STEP)
    trackers.close()
    [line] = lines
    assert line.startswith("wandb failed and gets nothing more of this run: AttributeError: ")


def test_a_package_that_is_not_there_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_trackers(())
    with pytest.raises(ConfigError, match=r"^trackers: wandb is not installed; pip install -e '\.\[wandb\]'$"):
        check_trackers(["wandb"])


def test_tensorboard_has_the_numbers_and_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The first is resumed before its first checkpoint.
    for version, rewards in ((0, (0.4, 0.5)), (0, (0.1, 0.2, 0.3)), (1, (0.25,))):
        trackers = Trackers(make_config("tensorboard"), tmp_path, version, pytest.fail)
        for step, reward in enumerate(rewards, version + 1):
            trackers.log({"step": step, "reward": reward, "reward_parts": {"right": reward}})
        trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("reward", "reward_parts/right"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (1, pytest.approx(0.1)),
            (2, pytest.approx(0.25)),
        ]
    [config] = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary")][-1:]
    assert '"name": "charts"' in config


def test_a_tracker_that_does_not_end_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, lines, ends = install(monkeypatch, "trackio"), list[str](), threading.Event()
    monkeypatch.setattr("learner.reporting.trackers._CLOSE_S", 0.05)
    monkeypatch.setattr(service, "finish", ends.wait)
    Trackers(make_config("trackio"), tmp_path, 0, lines.append).close()
    ends.set()
    assert lines == ["trackio failed and gets nothing more of this run: TimeoutError: it did not end within 0.05 s"]
