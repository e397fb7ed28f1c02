"""Rewards by name: import paths, entry points, and mistakes in one line."""

import importlib.metadata
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError, NotYet, load_config
from learner.config import LearnerConfig, RewardConfig
from learner.rewards import RewardRunner
from learner.rewards.load import load_reward
from tests.helpers.fakes import make_task

MODULE = "rewards_of_a_test"


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module
    yield module
    del sys.modules[MODULE]


@pytest.mark.parametrize("name", ["exact_match", "learner.rewards.builtin.exact_match:exact_match"])
def test_a_reward_by_name_and_by_path(name: str) -> None:
    assert load_reward(name)(make_task(" 7\n", "77", ground_truth=7)) == [1.0, 0.0]


def test_the_built_ins_are_entry_points() -> None:
    names = importlib.metadata.entry_points(group="outrider.rewards").names
    assert names >= {"box_iou", "exact_match", "format", "math_equal", "multiple_choice", "ocr"}
    for name in names:
        assert callable(load_reward(name))


def test_a_name_that_two_packages_offer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = importlib.metadata.EntryPoints(
        importlib.metadata.EntryPoint("judge", path, "outrider.rewards") for path in ("b:judge", "a:judge")
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: offered)
    with pytest.raises(ConfigError, match="several packages have a 'judge'; write a:judge or b:judge"):
        load_reward("judge")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", r"'nonsense' is neither an import path .* nor one of box_iou, exact_match, "),
        (":f", "write it as package.module:function"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        (f"{MODULE}:missing", "has no 'missing'"),
        (f"{MODULE}:number", "is a int, not a function"),
        (f"{MODULE}:greedy", "wants an argument 'judge'"),
        (f"{MODULE}:later", "is a coroutine"),
        (f"{MODULE}:by_position", "takes 'completion' by position only"),
        (f"{MODULE}:of_trl", "wants 'trainer_state', which only TRL's trainer has"),
    ],
)
def test_bad_names_are_one_line(module: types.ModuleType, name: str, message: str) -> None:
    async def later(**_: Any) -> float:
        return 0.0

    def greedy(completion: str, judge: str) -> float:
        return 0.0

    def by_position(completion: str, /) -> float:
        return 0.0

    def of_trl(completions: list[Any], trainer_state: object, **_: Any) -> list[float]:
        return []

    module.__dict__.update(number=3, greedy=greedy, later=later, by_position=by_position, of_trl=of_trl)
    with pytest.raises(ConfigError, match=message) as caught:
        load_reward(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def reward(:", r"cannot import 'own_reward': SyntaxError: .* \(own_reward.py, line 1\)"),
        ("\nsize = 1 / 0", r"cannot import 'own_reward': ZeroDivisionError: .* \(own_reward.py, line 2\)"),
    ],
)
def test_a_module_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "own_reward.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        load_reward("own_reward:reward")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, NotYet)


def test_math_equal_without_its_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "learner.rewards.builtin.math_equal", raising=False)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"math_equal needs the package math-verify; pip install -e '\.\[math\]'"):
        load_reward("math_equal")


def test_mistakes_show_before_any_process_starts() -> None:
    with pytest.raises(ConfigError, match="cannot import 'no_such_module'"):
        RewardRunner(["exact_match", "no_such_module:f"], decode=str)
    with pytest.raises(ConfigError, match="1 weights for 2 functions"):
        RewardRunner(["exact_match", "format"], [1.0], decode=str)


def test_configuration() -> None:
    assert RewardConfig().functions == ("exact_match",)
    assert RewardConfig(functions=("a:b", "c"), weights=(1, 0.5)).weights == (1.0, 0.5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "reward.weights=[1, 2]",
            "reward: there are 2 weights for 1 functions; give one for each, or none (reward.weights='[]')",
        ),
        ("reward.functions=[]", "reward.functions: "),
        ("reward.weights=[.nan]", "reward.weights.0: Input should be a finite number"),
        ("reward.function=exact_match", "reward.function: unknown key; did you mean functions?"),
        ("reward.num_processes=0", "reward.num_processes: Input should be greater than or equal to 1"),
    ],
)
def test_mistakes_in_the_configuration(override: str, message: str) -> None:
    needed = ["model.path=m", "data.train=t", "trainer.total_steps=1", "trainer.batch_prompts=1"]
    with pytest.raises(ConfigError) as caught:
        load_config(LearnerConfig, None, [*needed, override])
    assert message in str(caught.value)


def test_a_module_that_ends_the_process_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its exit code, 0 as often as not, the run would seem to have ended well."""
    (tmp_path / "program_reward.py").write_text("import sys\ndef reward(completion): return 1.0\nsys.exit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="'program_reward' ends the process when it is imported") as caught:
        load_reward("program_reward:reward")
    assert "\n" not in str(caught.value)


def test_what_a_module_changes_of_the_learners_process_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
import os, signal
os.chdir("/")
signal.signal(signal.SIGINT, signal.SIG_IGN)
def reward(completion): return 1.0
"""
    (tmp_path / "rude_reward.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    RewardRunner(["rude_reward:reward"], decode=str).close()
    assert Path.cwd() == tmp_path
    assert signal.getsignal(signal.SIGINT) is handler
