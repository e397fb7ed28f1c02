"""`outrider --check`: what it finds, and that nothing is started."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from tests.helpers.launched import free_ports, launching

Said = subprocess.CompletedProcess[str]
Check = Callable[..., Said]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """The command in a folder with a task; an argument is an override."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n' * 10)
    run: dict[str, Any] = {
        "model": {"path": "model"},
        "data": {"train": "rows.jsonl", "image_column": "", "held_out_fraction": 0.2},
        "reward": {"functions": ["exact_match"]},
        "trainer": {"total_passes": 3, "batch_prompts": 4, "device": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    before = set(tmp_path.iterdir())

    def run_check(*overrides: str) -> Said:
        command = [sys.executable, "-m", "learner.launcher", "--check", "--config", "run.yaml", *overrides]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert set(tmp_path.iterdir()) == before
        return said

    return run_check


def test_a_sound_configuration_is_one_line(check: Check) -> None:
    said = check()
    assert (said.returncode, said.stderr) == (0, "")
    [line] = said.stdout.splitlines()
    assert line.startswith("run.yaml is sound: 8 rows, 2 held out (")
    assert line.endswith(", 6 steps = 3 passes over 8 rows, rewards exact_match (imported)")


def test_every_mistake_is_told(check: Check) -> None:
    task = ("model.path=nope", "reward.functions=[nope:reward]", "rollout.n=300", "rollout.min_actors=3")
    said = check(*task, "runs_dir=rows.jsonl/runs")
    assert (said.returncode, said.stdout) == (2, "")
    found = [
        "outrider: rollout.n is 300, but limits.max_group_size of local.actor is ",
        "outrider: model.path: nope holds no checkpoint",
        "outrider: runs_dir: ",
        "outrider: rollout.min_actors is 3, but there are 2 actors",
        "outrider: reward: ",
    ]
    assert [line[: len(words)] for line, words in zip(said.stderr.splitlines(), found, strict=True)] == found


def test_an_unknown_key_is_told(check: Check) -> None:
    said = check("rollout.m=3", "local.actor={vlm: {}}")
    assert said.returncode == 2
    assert said.stderr.startswith("outrider: run.yaml: rollout.m: unknown key")
    said = check("local.actor={vlm: {}}")
    assert said.returncode == 2
    assert said.stderr == "outrider: local.actor: vlm: unknown key; did you mean vllm?\n"


def test_actors_that_run_already_are_asked(check: Check, tmp_path_factory: pytest.TempPathFactory) -> None:
    port = free_ports(2)
    answers, silent = f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"
    overrides = ("local.num_actors=0", f"rollout.actors=['{answers}', '{silent}']")
    with launching(tmp_path_factory.mktemp("actor")) as launch:
        settings = ("engine=fake", "standalone=true", f"listen={answers}", "limits.max_group_size=4")
        actor = launch(*settings, module="actor")
        actor.until(lambda: "ready on" in actor.stdout, 60, "ready")
        sound = check(*overrides, "rollout.n=4")
        mistaken = check(*overrides, "rollout.n=5", "reward.functions=[nope:reward]")
    first, second, last = sound.stdout.splitlines()
    assert (sound.returncode, first, sound.stderr) == (0, f"actor {answers} answers", "")
    assert second == f"actor {silent} does not answer now: UNREACHABLE: Connection refused"
    assert last.startswith("run.yaml is sound: ")
    limits, reward = mistaken.stderr.splitlines()
    of_actor = f"limits.max_group_size of actor {answers} is 4; lower the one or raise the other"
    assert limits == f"outrider: rollout.n is 5, but {of_actor}"
    assert reward.startswith("outrider: reward: ")
    assert (mistaken.returncode, mistaken.stdout) == (2, "")
