"""Which run folder a command works in."""

import contextlib
import errno
import fcntl
import os
import re
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from common.config import ConfigError, NotYet
from learner import last_words
from learner.config import LearnerConfig
from learner.storage import run_folder


def _config(runs_dir: Path, **changes: object) -> LearnerConfig:
    values = {
        "name": "task",
        "model": {"path": "model"},
        "data": {"train": "rows.jsonl"},
        "trainer": {"total_steps": 3, "batch_prompts": 2},
        "runs_dir": runs_dir,
    }
    return LearnerConfig.model_validate(values | changes)


def _chosen(config: LearnerConfig) -> Path:
    with run_folder.held(config, "launcher") as run_dir:
        return run_dir


def _checkpoint(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step-000001").mkdir(parents=True)


def test_an_unfinished_run_of_the_same_configuration_is_continued(tmp_path: Path) -> None:
    first = _chosen(_config(tmp_path))
    assert _chosen(_config(tmp_path)) == first
    # Where the actors are is no part of what is computed.
    assert _chosen(_config(tmp_path, rollout={"actors": ["127.0.0.1:1"]})) == first
    # Nor is how long the ranks are patient with each other, or what makes the step fit into memory.
    patient = {"total_steps": 3, "batch_prompts": 2, "rank_timeout_s": 300.0, "max_tokens_per_micro_batch": 64}
    assert _chosen(_config(tmp_path, trainer=patient)) == first
    assert yaml.safe_load((first / "config.yaml").read_text())["trainer"]["rank_timeout_s"] == 300.0
    assert _chosen(_config(tmp_path, rollout={"max_message_bytes": 2**28})) == first
    # Nor what else would end it.
    data, evaluation = {"train": "rows.jsonl", "max_media_pixels": 2**26}, {"max_failed_share": 0.5}
    assert _chosen(_config(tmp_path, data=data, evaluation=evaluation)) == first


def test_a_run_that_an_earlier_version_has_begun_is_continued(tmp_path: Path) -> None:
    first = _chosen(_config(tmp_path))
    values = yaml.safe_load((first / "config.yaml").read_text())
    del values["rollout"]["min_actors"], values["algorithm"]["clip_dual"], values["evaluation"]
    values["trainer"]["eval_every"] = 20  # without rows for it, which was allowed
    (first / "config.yaml").write_text(yaml.safe_dump(values))
    assert _chosen(_config(tmp_path)) == first


def test_a_run_of_so_many_passes_is_continued_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passes = {"total_passes": 2, "batch_prompts": 2}
    first = _chosen(_config(tmp_path, trainer=passes))
    values = yaml.safe_load((first / "config.yaml").read_text())
    _checkpoint(first)
    assert _chosen(_config(tmp_path, trainer=passes)) == first
    assert _chosen(LearnerConfig.model_validate(values)) == first
    assert capsys.readouterr().out == ""
    longer = _config(tmp_path, run_dir=first, trainer={"total_passes": 3, "batch_prompts": 2})
    assert _chosen(longer) == first
    assert capsys.readouterr().out == f"{first} goes on with another trainer.total_passes\n"


def test_a_run_of_steps_that_knew_no_passes_is_continued(tmp_path: Path) -> None:
    first = _chosen(_config(tmp_path))
    values = yaml.safe_load((first / "config.yaml").read_text())
    del values["trainer"]["total_passes"]
    (first / "config.yaml").write_text(yaml.safe_dump(values))
    assert _chosen(_config(tmp_path)) == first


def test_a_new_run_says_in_what_an_unfinished_one_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = _chosen(_config(tmp_path))
    _checkpoint(first)
    assert capsys.readouterr().out == ""
    other = _config(tmp_path, optimizer={"lr": 0.1}, trainer={"total_steps": 4, "batch_prompts": 2})
    _chosen(other)
    hint = f"{first} is unfinished and has another optimizer.lr, trainer.total_steps; run_dir={first} continues it"
    assert capsys.readouterr().out == f"a new run: {hint}\n"
    assert _chosen(other.model_copy(update={"run_dir": first})) == first
    assert capsys.readouterr().out == f"{first} goes on with another optimizer.lr, trainer.total_steps\n"


def test_a_run_that_cannot_be_continued_is_not_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = _chosen(_config(tmp_path))
    _checkpoint(first)
    _chosen(_config(tmp_path, seed=1, trainer={"total_steps": 4, "batch_prompts": 2}))
    hint = f"{first} is unfinished and has another seed, trainer.total_steps"
    assert capsys.readouterr().out == f"a new run: {hint}\n"


@pytest.mark.parametrize(
    ("changes", "before"),
    [
        ({"seed": 1, "trainer": {"total_steps": 4, "batch_prompts": 2}}, "seed=0"),
        ({"model": {"path": "other", "lora_rank": 8}}, "model.path=model"),
        ({"model": {"path": "model", "lora_rank": 8, "lora_alpha": 64}}, "model.lora_alpha=16"),
        ({"model": {"path": "model"}}, "model.lora_rank=8"),
        ({"data": {"train": "other.jsonl"}}, "data.train=rows.jsonl"),
        ({"data": {"train": "rows.jsonl", "held_out_fraction": 0.5}}, "data.held_out_fraction=0.0"),
    ],
)
@pytest.mark.parametrize("role", ["launcher", "learner"])
def test_a_checkpoint_goes_on_with_what_it_is_of(
    tmp_path: Path, changes: dict[str, object], before: str, role: run_folder.Role
) -> None:
    here, lora = tmp_path / "here", {"path": "model", "lora_rank": 8}
    config = _config(tmp_path, run_dir=here, model=lora)
    assert _chosen(config) == here
    assert _chosen(_config(tmp_path, **{"run_dir": here, "model": lora} | changes)) == here  # nothing is trained yet
    assert _chosen(config) == here
    _checkpoint(here)
    with (
        pytest.raises(ConfigError, match=f"the checkpoints in {here} are of {before}; give that again, or another run"),
        run_folder.held(_config(tmp_path, **{"run_dir": here, "model": lora} | changes), role),
    ):
        pass
    assert _chosen(config) == here  # it is still the configuration of the run


def test_what_a_checkpoint_is_of_may_be_mounted_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def config(models: str, data: str, **more: object) -> LearnerConfig:
        model = {"path": f"{models}vlm", "lora_adapter_path": f"{models}adapter"}
        return _config(tmp_path, model=model, data={"train": f"{data}rows.jsonl"}, **more)

    first = _chosen(config("/home/me/", "data/"))
    _checkpoint(first)
    second = _chosen(config("/models/", "/data/"))
    assert second != first
    odd = "model.path, model.lora_adapter_path, data.train"
    hint = f"{first} is unfinished and has another {odd}; run_dir={first} continues it"
    assert capsys.readouterr().out == f"a new run: {hint}\n"
    assert _chosen(config("/models/", "/data/", run_dir=first)) == first
    assert capsys.readouterr().out == f"{first} goes on with another {odd}\n"


def test_a_learner_may_go_on_with_the_model_that_a_launcher_prepared(tmp_path: Path) -> None:
    with run_folder.held(_config(tmp_path), "launcher") as first:
        prepared = _config(tmp_path, run_dir=first, model={"path": first / "model"})
        (first / "learner.yaml").write_text(yaml.safe_dump(prepared.model_dump(mode="json")))
    _checkpoint(first)
    with run_folder.held(prepared, "learner") as again:
        assert again == first
    assert _chosen(_config(tmp_path)) == first  # the launcher's configuration has the model before
    assert _chosen(_config(tmp_path, run_dir=first)) == first


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": True}, {"enable_thinking": False, "budget": 2}])
def test_arguments_of_the_template_may_come_and_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: dict[str, object]
) -> None:
    first = _chosen(_config(tmp_path, data={"train": "a", "chat_template_arguments": arguments}))
    _checkpoint(first)
    other = {"train": "a", "chat_template_arguments": {"enable_thinking": False}, "max_media_pixels": 9}
    assert _chosen(_config(tmp_path, data=other)) != first
    path = "budget" if "budget" in arguments else "enable_thinking"
    assert f"has another data.chat_template_arguments.{path};" in capsys.readouterr().out


def test_a_run_that_has_nothing_to_continue_is_not_spoken_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a mistake that was corrected."""
    _chosen(_config(tmp_path))
    _chosen(_config(tmp_path, seed=1))
    assert capsys.readouterr().out == ""


def test_a_run_of_another_name_is_not_spoken_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _checkpoint(_chosen(_config(tmp_path, name="task-big")))
    _chosen(_config(tmp_path))
    assert capsys.readouterr().out == ""


def test_a_full_disk_leaves_the_configuration_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _chosen(_config(tmp_path))
    write_text = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        write_text(path, text[:5], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            _chosen(_config(tmp_path, metrics_listen="127.0.0.1:1"))
    assert _chosen(_config(tmp_path)) == first


def test_a_run_that_goes_on_with_other_settings_is_a_run_of_these(tmp_path: Path) -> None:
    first = _chosen(_config(tmp_path))
    with run_folder.held(_config(tmp_path, optimizer={"lr": 0.1}, run_dir=first), "learner"):
        pass
    assert _chosen(_config(tmp_path, optimizer={"lr": 0.1})) == first
    assert _chosen(_config(tmp_path)) != first


def test_a_launchers_learner_leaves_the_configuration_as_it_is(tmp_path: Path) -> None:
    with run_folder.held(_config(tmp_path), "launcher") as first:
        prepared = _config(tmp_path, run_dir=first, model={"path": first / "model"})
        with run_folder.held(prepared, "learner"):
            pass
    assert _chosen(_config(tmp_path)) == first


def test_without_resume_no_checkpoint_is_resumed(tmp_path: Path) -> None:
    config = _config(tmp_path, run_dir=tmp_path / "here", resume=False)
    assert _chosen(config) == tmp_path / "here"
    _checkpoint(tmp_path / "here")
    with pytest.raises(ConfigError, match=r"resume: is false, but .*here has checkpoints"):
        _chosen(config)
    assert _chosen(config.model_copy(update={"resume": True})) == tmp_path / "here"


@pytest.mark.parametrize("changes", [{"seed": 1}, {"resume": False}, {"optimizer": {"lr": 0.1}}])
def test_another_configuration_gets_a_folder_of_its_own(tmp_path: Path, changes: dict[str, object]) -> None:
    assert _chosen(_config(tmp_path)) != _chosen(_config(tmp_path, **changes))


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    first = _chosen(_config(tmp_path))
    (first / "summary.json").write_text("{}")
    assert _chosen(_config(tmp_path)) != first


@pytest.mark.parametrize("role", ["launcher", "learner"])
def test_a_run_that_somebody_works_in_is_left_alone(
    tmp_path: Path, role: run_folder.Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_GRACE_S", 0.01)
    with run_folder.held(_config(tmp_path), role) as first:
        with run_folder.held(_config(tmp_path), role) as another:
            assert another != first
        with (
            pytest.raises(NotYet, match=f"another {role} is at work"),
            run_folder.held(_config(tmp_path, run_dir=first), role),
        ):
            pass
    with run_folder.held(_config(tmp_path, run_dir=first), role) as again:
        assert again == first


def test_a_launcher_continues_a_run_whose_learner_still_ends_its_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after SIGKILL of the launcher before it: its own learner waits."""
    first = _chosen(_config(tmp_path))
    _checkpoint(first)
    with run_folder.held(_config(tmp_path, run_dir=first), "learner"):
        assert _chosen(_config(tmp_path)) == first
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("role", ["launcher", "learner"])
def test_a_run_with_checkpoints_is_continued_before_a_newer_one_without(tmp_path: Path, role: run_folder.Role) -> None:
    with run_folder.held(_config(tmp_path), "launcher") as first:
        newer = _chosen(_config(tmp_path))
        assert newer != first
    assert _chosen(_config(tmp_path)) == newer
    _checkpoint(first)
    with run_folder.held(_config(tmp_path), role) as again:
        assert again == first


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_learner_waits_for_the_one_before_it_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_finished: bool
) -> None:
    """As where a Job is deleted and applied again: its pod is still ending then."""
    with contextlib.ExitStack() as before:
        first = before.enter_context(run_folder.held(_config(tmp_path), "learner"))

        def sleep(_seconds: float) -> None:
            if is_finished:
                (first / "summary.json").write_text("{}")
            before.close()

        monkeypatch.setattr(run_folder, "time", mock.Mock(wraps=time, sleep=sleep))  # other threads sleep on
        with run_folder.held(_config(tmp_path), "learner") as second:
            assert (second == first) == (not is_finished)
    assert capsys.readouterr().out == f"another learner is at work in {first}; waiting up to 300 s for its end\n"


def test_a_learner_waits_for_the_folder_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as before:
        first = before.enter_context(run_folder.held(_config(tmp_path), "learner"))
        monkeypatch.setattr(run_folder, "time", mock.Mock(wraps=time, sleep=lambda _seconds: before.close()))
        with run_folder.held(_config(tmp_path, run_dir=first), "learner") as second:
            assert second == first


def test_a_learner_that_does_not_end_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hint = "a new run: {} is unfinished, and another learner is at work in it\n"
    with run_folder.held(_config(tmp_path), "learner") as first:
        monkeypatch.setattr(run_folder, "_GRACE_S", 0.01)
        with run_folder.held(_config(tmp_path), "learner") as second:
            assert second != first
        assert capsys.readouterr().out.endswith(hint.format(first))
        with run_folder.held(_config(tmp_path), "learner") as again:
            assert again == second
        with run_folder.held(_config(tmp_path), "learner"), run_folder.held(_config(tmp_path), "learner") as third:
            assert third not in (first, second)
        assert capsys.readouterr().out.endswith(hint.format(second))


def test_a_launcher_and_its_learner_share_a_folder(tmp_path: Path) -> None:
    with (
        run_folder.held(_config(tmp_path), "launcher") as first,
        run_folder.held(_config(tmp_path, run_dir=first), "learner") as same,
    ):
        assert same == first


def test_the_first_last_words_count(tmp_path: Path) -> None:
    assert last_words.read(tmp_path, os.getppid()) is None
    last_words.leave(tmp_path, 1, "ImageMismatch: group 3: two images")
    last_words.leave(tmp_path, 1, "RuntimeError: connection closed by peer")
    assert last_words.read(tmp_path, os.getppid()) == (1, "ImageMismatch: group 3: two images")


@pytest.mark.parametrize("role", ["launcher", "learner"])
def test_last_words_are_not_those_of_an_earlier_learner(tmp_path: Path, role: run_folder.Role) -> None:
    with run_folder.held(_config(tmp_path), role) as run_dir:
        last_words.leave(run_dir, 1, "OSError: disk full")
    with run_folder.held(_config(tmp_path, run_dir=run_dir), role):
        assert last_words.read(run_dir, os.getppid()) is None


def test_a_learner_leaves_the_last_words_of_another_rank_to_its_launcher(tmp_path: Path) -> None:
    with run_folder.held(_config(tmp_path), "launcher") as run_dir:
        last_words.leave(run_dir, 1, "OSError: disk full")
        with run_folder.held(_config(tmp_path, run_dir=run_dir), "learner"):
            assert last_words.read(run_dir, os.getppid()) == (1, "OSError: disk full")


def test_last_words_are_those_of_the_learner_that_is_asked_about(tmp_path: Path) -> None:
    """One whose launcher was killed may fail while the next one starts."""
    last_words.leave(tmp_path, 1, "OSError: disk full")
    assert last_words.read(tmp_path, os.getpid()) is None


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(ConfigError, match=r"task-.*: its file system gives no locks \(flock: Function not") as caught,
        run_folder.held(_config(tmp_path), "learner"),
    ):
        pass
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EROFS, ConfigError), (errno.EACCES, ConfigError), (errno.EIO, NotYet)]
)
def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[ConfigError]
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    made = tmp_path / "made"
    (made / "logs").mkdir(parents=True)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        ConfigError, match=rf"^runs_dir: {tmp_path} cannot be written: {os.strerror(number)}$"
    ) as caught:
        _chosen(_config(tmp_path))
    assert type(caught.value) is kind
    with pytest.raises(ConfigError, match=rf"^run_dir: {made} cannot be written: {os.strerror(number)}$"):
        _chosen(_config(tmp_path, run_dir=made))


def test_a_place_where_no_folder_can_be_made_is_known_before_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder.check(_config(tmp_path))
    run_folder.check(_config(tmp_path / "a" / "b"))
    run_folder.check(_config(tmp_path, run_dir=tmp_path / "a"))
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "runs"
    with pytest.raises(ConfigError, match=f"^runs_dir: {below} cannot be written: Not a directory$"):
        run_folder.check(_config(below))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path if mode else access(path, mode))
    with pytest.raises(ConfigError, match=f"^runs_dir: {tmp_path} cannot be written: Permission denied$"):
        run_folder.check(_config(tmp_path / "a" / "b"))
    with pytest.raises(ConfigError, match=f"^run_dir: {tmp_path} cannot be written: Permission denied$"):
        run_folder.check(_config(tmp_path, run_dir=tmp_path / "a"))
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_a_folder_that_cannot_be_read_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = _chosen(_config(tmp_path))
    _checkpoint(theirs)
    (theirs / "config.yaml").unlink()  # as it seems
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != theirs and access(path, mode))
    with run_folder.held(_config(tmp_path), "launcher") as mine:
        assert mine != theirs
    assert capsys.readouterr().out == f"a new run: {theirs} cannot be read\n"


@pytest.mark.parametrize("refused", ["", "launcher.lock", "logs", "logs/learner-0.log", "metrics.jsonl", "checkpoints"])
def test_a_run_of_another_user_is_left_alone_and_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: str
) -> None:
    theirs = _chosen(_config(tmp_path))
    _checkpoint(theirs)
    (theirs / "logs" / "learner-0.log").touch()
    (theirs / "metrics.jsonl").touch()
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK and Path(path) == theirs / refused)
    )
    monkeypatch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
    whose = f"{theirs} (of the user {theirs.owner()})"
    with run_folder.held(_config(tmp_path), "launcher") as mine:
        assert mine != theirs
    assert capsys.readouterr().out == f"a new run: {whose} is unfinished, and cannot be written, or a part of it\n"
    with pytest.raises(ConfigError, match=rf"^{re.escape(whose)} cannot be written, or a part of it; name another run"):
        _chosen(_config(tmp_path, run_dir=theirs))
    with run_folder.held(_config(tmp_path, optimizer={"lr": 0.1}), "launcher"):
        assert capsys.readouterr().out == ""  # it is no run of these settings anyway


def test_a_folder_of_another_user_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = _chosen(_config(tmp_path))

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=rf"^{theirs} cannot be written: Permission denied$") as caught:
        _chosen(_config(tmp_path, run_dir=theirs))
    assert caught.value.exit_code == 2
    monkeypatch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
    whose = re.escape(f"{theirs} (of the user {theirs.owner()})")
    with pytest.raises(ConfigError, match=rf"^{whose} cannot be written: Permission denied$"):
        _chosen(_config(tmp_path, run_dir=theirs))


def test_last_words_can_be_read_whatever_they_say(tmp_path: Path) -> None:
    last_words.leave(tmp_path, 1, "ValueError: half of a pair: \ud83d")
    assert last_words.read(tmp_path, os.getppid()) == (1, "ValueError: half of a pair: \\ud83d")


def test_last_words_that_cannot_be_written_hide_no_others(tmp_path: Path) -> None:
    last_words.leave(tmp_path / "gone", 1, "OSError: disk full")
    assert last_words.read(tmp_path / "gone", os.getppid()) is None


def test_who_looks_whether_a_folder_is_free_takes_it_from_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command of the same name goes through all unfinished runs, while one of them is started again."""
    mine = _chosen(_config(tmp_path))
    with run_folder._lock(mine, "launcher", is_probe=True):
        assert run_folder._is_free(mine)
        flock, refusals = fcntl.flock, iter([BlockingIOError()] * 3)

        def probed(descriptor: int, operation: int) -> None:
            if operation & fcntl.LOCK_EX and (refusal := next(refusals, None)) is not None:
                raise refusal
            flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", probed)
    with run_folder.held(_config(tmp_path), "launcher") as run_dir:
        assert run_dir == mine
        assert not run_folder._is_free(mine, "launcher")
