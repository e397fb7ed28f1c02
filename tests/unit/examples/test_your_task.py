"""The files that a run of one's own starts from, and what the documents say of them."""

import re
from pathlib import Path

import pytest

from common.config import load_config
from learner.config import LearnerConfig
from learner.launcher.gpus import shares_of
from learner.rewards.load import load_rewards
from tests.helpers.fakes import make_task

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples" / "your_task"


def test_the_configuration_is_valid_and_takes_four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    config = load_config(LearnerConfig, FOLDER / "run.yaml", [])
    shares = shares_of(config, ["0", "1", "2", "3"])
    assert (shares.learner, shares.actors) == (("0", "1"), (("2",), ("3",)))
    [reward] = load_rewards(config.reward.functions)
    assert reward(make_task("4", " 4\n", "44", "5", ground_truth="4")) == [1.0, 1.0, 0.0, 0.0]


def test_commands_of_the_documents_fit_the_files() -> None:
    commands = []
    for document in ("README.md", "docs/your-task.md"):
        text = (ROOT / document).read_text()
        commands += re.findall(r"^PYTHONPATH=(\S+) outrider --config (\S+) ?(.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    for folder, file, overrides in commands:
        assert Path(file).parent == Path(folder)
        assert load_config(LearnerConfig, FOLDER / Path(file).name, overrides.split()).name in {"charts", "try"}


def test_the_reward_of_the_readme_is_the_one_that_comes_along() -> None:
    [block] = re.findall(r"```python\n(def reward.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    source = (FOLDER / "my_rewards.py").read_text().splitlines()
    assert all(line in source for line in block.splitlines())
