"""Which run folder a command works in."""

from pathlib import Path

import pytest

from common.config import ConfigError
from learner import run_folder
from learner.config import LearnerConfig


def _config(runs_dir: Path, **changes: object) -> LearnerConfig:
    values = {
        "name": "task",
        "model": {"path": "model"},
        "data": {"train": "rows.jsonl"},
        "trainer": {"total_steps": 3, "batch_prompts": 2},
        "runs_dir": runs_dir,
    }
    return LearnerConfig.model_validate(values | changes)


def test_an_unfinished_run_of_the_same_configuration_is_continued(tmp_path: Path) -> None:
    first = run_folder.choose(_config(tmp_path))
    assert run_folder.choose(_config(tmp_path)) == first
    # Where the actors are is no part of what is computed.
    assert run_folder.choose(_config(tmp_path, rollout={"actors": ["127.0.0.1:1"]})) == first


@pytest.mark.parametrize("changes", [{"seed": 1}, {"resume": False}, {"optimizer": {"lr": 0.1}}])
def test_another_configuration_gets_a_folder_of_its_own(tmp_path: Path, changes: dict[str, object]) -> None:
    assert run_folder.choose(_config(tmp_path)) != run_folder.choose(_config(tmp_path, **changes))


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    first = run_folder.choose(_config(tmp_path))
    (first / "summary.json").write_text("{}")
    assert run_folder.choose(_config(tmp_path)) != first


def test_a_run_that_somebody_works_in_is_left_alone(tmp_path: Path) -> None:
    first = run_folder.choose(_config(tmp_path))
    run_folder.lock(first)
    assert run_folder.choose(_config(tmp_path)) != first
    with pytest.raises(ConfigError, match="another learner is at work"):
        run_folder.lock(first)
