"""What the single-machine launcher says of its learner's end."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from learner.config import LearnerConfig
from learner.launcher import main
from learner.launcher.actors import LocalActors
from learner.launcher.gpus import GpuShares

_FAILING_RANK = """
import sys, pathlib
from learner import last_words
last_words.leave(pathlib.Path(sys.argv[1]), 1, "OSError: [Errno 28] No space left on device")
"""


@pytest.mark.parametrize(
    ("actor", "words"),
    [
        ({"vlm": {"max_model_len": 5}}, "local.actor: vlm: unknown key; did you mean vllm?"),
        (
            {"vllm": {"tensor_parallel_size": "two"}},
            "local.actor: vllm.tensor_parallel_size: ",
        ),  # read where GPUs are shared
        ({"vllm": 5}, "local.actor: vllm: "),
        (
            {"vllm": {"max_model_len": 128}},
            "rollout.max_tokens is 256, but vllm.max_model_len of local.actor is 128; lower the one or raise the other",
        ),
        (
            {"limits": {"max_group_size": 4}},
            "rollout.n is 8, but limits.max_group_size of local.actor is 4; lower the one or raise the other",
        ),
    ],
)
def test_a_mistake_in_the_configuration_of_actors_is_told_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], actor: dict[str, object], words: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({}, model / "model.safetensors")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    run = {
        "model": {"path": str(model)},
        "data": {"train": str(tmp_path / "rows.jsonl"), "image_column": ""},
        "trainer": {"total_steps": 1, "batch_prompts": 1, "device": "cpu"},
        "runs_dir": str(tmp_path / "runs"),
        "local": {"actor": actor},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main.main(["--config", str(tmp_path / "run.yaml")]) == 2
    finally:
        signal.signal(signal.SIGTERM, handler)
    told = capsys.readouterr().err
    assert told.startswith(f"outrider: {words}")
    assert told.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_the_stop_that_cannot_be_written_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*_: object) -> "subprocess.Popen[bytes]":
        """In the place of torchrun: a rank of it fails when it is asked to stop."""
        rank = [sys.executable, "-c", _FAILING_RANK, str(tmp_path)]
        code = f"import signal, subprocess; signal.signal(signal.SIGTERM, lambda *_: exit(subprocess.call({rank})));"
        learner = subprocess.Popen(
            [sys.executable, "-c", f"{code} print(flush=True); signal.pause()"],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert learner.stdout is not None
        learner.stdout.readline()
        learner.stdout.close()
        return learner

    def ctrl_c(_actors: LocalActors) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_start_learner", start)
    monkeypatch.setattr(main, "_STOP_S", 60.0)
    monkeypatch.setattr(LocalActors, "restart_dead", ctrl_c)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt):
            main._run_in(tmp_path, _config(0), GpuShares())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "outrider: OSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("num_actors", "end", "said", "is_kept"),
    [
        (1, "sys.exit(0)", "the learner ended before its run: it could not say why; see ", False),
        (1, "sys.exit(1)", "the learner ended before its run: it could not say why; see ", False),
        (1, "sys.exit(137)", "the learner was killed; the same command resumes it. The actors wait for it: ", True),
        (1, "os.kill(0, 9)", "the learner was killed; the same command resumes it. The actors wait for it: ", True),
        (0, "sys.exit(137)", "the learner was killed; the same command resumes it", True),
    ],
)
def test_a_learner_that_ends_without_a_word(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_actors: int,
    end: str,
    said: str,
    is_kept: bool,
) -> None:
    """Killed, it will be started again; after anything else nobody waits for it, as after a disk that was full."""

    def start(*_: object) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", f"import os, sys; {end}"], start_new_session=True)

    def terminate(actors: LocalActors) -> None:
        ended.append(actors)

    ended: list[LocalActors] = []
    monkeypatch.setattr(main, "_start_learner", start)
    for name in ("start", "restart_dead", "end"):
        monkeypatch.setattr(LocalActors, name, lambda *_: None)
    monkeypatch.setattr(LocalActors, "terminate", terminate)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert main._run_in(tmp_path, _config(num_actors), GpuShares()) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"outrider: {said}")
    assert bool(ended) is not is_kept
    assert line.endswith(said) or num_actors


def test_a_disk_that_is_full_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/task-1/actors.json")

    monkeypatch.setattr(main, "_run", run)
    (tmp_path / "run.yaml").write_text(json.dumps(_config(0).model_dump(mode="json")))
    assert main.main(["--config", str(tmp_path / "run.yaml")]) == 1
    assert capsys.readouterr().err == "outrider: runs/task-1/actors.json: No space left on device\n"


def _config(num_actors: int) -> LearnerConfig:
    return LearnerConfig.model_validate(
        {
            "name": "task",
            "model": {"path": "model"},
            "data": {"train": "rows.jsonl"},
            "trainer": {"total_steps": 3, "batch_prompts": 2},
            "rollout": {"actors": ["127.0.0.1:1"]},
            "local": {"num_actors": num_actors},
        }
    )
