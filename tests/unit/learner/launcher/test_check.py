"""`outrider --check`: what it finds, and that nothing is started."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.launcher import actors, main
from tests.helpers.launched import free_ports, launching

Check = Callable[..., int]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """The command in a folder with a task; an argument is an override."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n' * 10)
    run: dict[str, Any] = {
        "model": {"path": "model"},
        "data": {"train": "rows.jsonl", "image_column": "", "held_out_fraction": 0.2},
        "reward": {"functions": ["exact_match"]},
        "trainer": {"total_passes": 3, "batch_prompts": 4, "device": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    monkeypatch.chdir(tmp_path)

    def started(*_: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(main, "_run_in", started)
    monkeypatch.setattr(actors, "LocalActors", started)
    before = set(tmp_path.iterdir())

    def run_check(*overrides: str) -> int:
        code = main.main(["--check", "--config", "run.yaml", *overrides])
        assert set(tmp_path.iterdir()) == before
        return code

    return run_check


def test_a_sound_configuration_is_one_line(check: Check, capfd: pytest.CaptureFixture[str]) -> None:
    assert check() == 0
    said = capfd.readouterr()
    assert said.err == ""
    [line] = said.out.splitlines()
    assert line.startswith("run.yaml is sound: 8 rows, 2 held out (")
    assert line.endswith(", 6 steps = 3 passes over 8 rows, rewards exact_match (imported)")


def test_every_mistake_is_told(check: Check, capfd: pytest.CaptureFixture[str]) -> None:
    overrides = ("model.path=nope", "reward.functions=[nope:reward]", "rollout.n=300", "rollout.min_actors=3")
    assert check(*overrides) == 2
    said = capfd.readouterr()
    assert said.out == ""
    found = [
        "outrider: rollout.n is 300, but limits.max_group_size of local.actor is ",
        "outrider: model.path: nope holds no checkpoint",
        "outrider: rollout.min_actors is 3, but there are 2 actors",
        "outrider: reward: ",
    ]
    assert [line[: len(words)] for line, words in zip(said.err.splitlines(), found, strict=True)] == found


def test_an_unknown_key_is_told(check: Check, capfd: pytest.CaptureFixture[str]) -> None:
    assert check("rollout.m=3", "local.actor={vlm: {}}") == 2
    assert capfd.readouterr().err.startswith("outrider: run.yaml: rollout.m: unknown key")
    assert check("local.actor={vlm: {}}") == 2
    assert capfd.readouterr().err == "outrider: local.actor: vlm: unknown key; did you mean vllm?\n"


@pytest.mark.timeout(180)
def test_actors_that_run_already_are_asked(
    check: Check, capfd: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    port = free_ports(2)
    answers, silent = f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"
    overrides = ("local.num_actors=0", f"rollout.actors=['{answers}', '{silent}']")
    with launching(tmp_path_factory.mktemp("actor")) as launch:
        settings = ("engine=fake", "standalone=true", f"listen={answers}", "limits.max_group_size=4")
        actor = launch(*settings, module="actor")
        actor.until(lambda: "ready on" in actor.stdout, 60, "ready")
        assert check(*overrides, "rollout.n=4") == 0
        sound = capfd.readouterr()
        assert check(*overrides, "rollout.n=5", "reward.functions=[nope:reward]") == 2
        mistaken = capfd.readouterr()
    first, second, last = sound.out.splitlines()
    assert (first, sound.err) == (f"actor {answers} answers", "")
    assert second == f"actor {silent} does not answer now: UNREACHABLE: Connection refused"
    assert last.startswith("run.yaml is sound: ")
    limits, reward = mistaken.err.splitlines()
    of_actor = f"limits.max_group_size of actor {answers} is 4; lower the one or raise the other"
    assert limits == f"outrider: rollout.n is 5, but {of_actor}"
    assert reward.startswith("outrider: reward: ")
    assert mistaken.out == ""
