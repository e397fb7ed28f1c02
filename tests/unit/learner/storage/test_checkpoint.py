"""Checkpoints: whole or not there, also on a full disk, and written while training goes on."""

import concurrent.futures
import contextlib
import errno
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from common.config import ConfigError
from learner.batch.pack_bytes import encode_packs
from learner.batch.packing import pack_batch
from learner.batch.processing import PromptProcessor
from learner.config import LearnerConfig
from learner.storage.checkpoint import drop_partial, latest_checkpoint, read_state
from learner.training.distributed import TIMEOUT, Ranks, join_ranks
from learner.training.policy import Policy
from tests.helpers.families import FAMILIES, build
from tests.helpers.groups import centred, group, image_bytes, mixed_groups, sample

Train = Callable[[Policy], None]


def config_of(model_dir: Path, **optimizer: Any) -> LearnerConfig:
    return LearnerConfig.model_validate(
        {
            "model": {"path": model_dir},
            "data": {"train": "unused"},
            "trainer": {"total_steps": 10, "batch_prompts": 4, "keep_checkpoints": 2},
            "optimizer": {"lr": 1e-2} | optimizer,
        }
    )


@pytest.fixture
def make_policy(model_dir: Path) -> Iterator[Callable[..., Policy]]:
    """Takes settings of the optimizer."""
    with join_ranks("cpu") as ranks:
        yield lambda **optimizer: Policy(config_of(model_dir, **optimizer), ranks)


@pytest.fixture
def train(processor: PromptProcessor) -> Train:
    groups = mixed_groups(processor)
    parts = [encode_packs(packs) for packs in pack_batch(groups, centred(groups), filler=processor.filler)]

    def train(policy: Policy) -> None:
        policy.step([parts])

    return train


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def trained_and_saved(make_policy: Callable[..., Policy], train: Train, run_dir: Path) -> Policy:
    """A policy after a step, with a checkpoint in `run_dir`."""
    policy = make_policy()
    train(policy)
    policy.save(run_dir, {})
    policy.finish()
    return policy


def parameters(policy: Policy) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = policy.model.state_dict()
    return {name: getattr(value, "full_tensor", lambda value=value: value)().clone() for name, value in state.items()}


def test_training_that_goes_on_does_not_change_what_is_being_written(
    make_policy: Callable[[], Policy], train: Train, tmp_path: Path
) -> None:
    policy = make_policy()
    train(policy)
    saved = parameters(policy)
    policy.save(tmp_path, {"note": 1})
    for _ in range(3):
        train(policy)
    policy.finish()
    assert not torch.equal(parameters(policy)["lm_head.weight"], saved["lm_head.weight"])
    again = make_policy()
    assert again.restore(tmp_path) == {"version": 1, "note": 1}
    assert all(torch.equal(value, saved[name]) for name, value in parameters(again).items())


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_checkpoint_before_the_first_update_changes_no_update(
    is_resumed: bool, make_policy: Callable[..., Policy], train: Train, tmp_path: Path
) -> None:
    """As after steps that were skipped. torch makes a state to save by a step of its own, which Adam would count."""
    plain, saved = make_policy(), make_policy()
    saved.save(tmp_path, {})
    saved.finish()
    if is_resumed:
        saved = make_policy()
        saved.restore(tmp_path)
    train(plain)
    train(saved)
    assert {float(state["step"]) for state in saved._optimizer.state.values()} == {1.0}
    for parameter, expected in zip(saved.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(parameter.full_tensor(), expected.full_tensor())  # type: ignore[attr-defined]


def test_only_the_newest_are_kept(make_policy: Callable[[], Policy], train: Train, tmp_path: Path) -> None:
    policy = make_policy()
    for _ in range(4):
        train(policy)
        policy.save(tmp_path, {})
    policy.finish()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000004"]


def test_the_newest_is_that_of_the_highest_number(
    make_policy: Callable[[], Policy], train: Train, tmp_path: Path
) -> None:
    """From 1,000,000 on names are in another order than numbers. A copy that somebody made is none of them."""
    policy = make_policy()
    policy.version = 999_997
    train(policy)
    first = policy.save(tmp_path, {})
    policy.finish()
    copy = shutil.copytree(first, first.with_name(f"{first.name}-copy"))
    for _ in range(3):
        train(policy)
        policy.save(tmp_path, {})
    policy.finish()
    newest = [tmp_path / "checkpoints" / name for name in ("step-1000000", "step-1000001")]
    assert set((tmp_path / "checkpoints").iterdir()) == {*newest, copy}
    assert latest_checkpoint(tmp_path) == newest[-1]


def test_an_old_checkpoint_that_stays_ends_no_run(
    make_policy: Callable[[], Policy], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where somebody reads it."""
    rmtree = shutil.rmtree

    def busy(path: Path, *, ignore_errors: bool = False) -> None:
        if path.name == "step-000001" and not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path, ignore_errors=ignore_errors)

    policy = make_policy()
    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
        patch.setattr("learner.storage.checkpoint.shutil.rmtree", busy)
        for _ in range(3):
            train(policy)
            policy.save(tmp_path, {})
        policy.finish()
    [warning] = [entry for entry in logs if entry["log_level"] == "warning"]
    assert warning["path"].endswith("step-000001")
    train(policy)
    policy.save(tmp_path, {})
    policy.finish()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000004"]


def test_a_resumed_optimizer_has_its_state_and_the_settings_of_now(
    make_policy: Callable[..., Policy], train: Train, tmp_path: Path
) -> None:
    before = trained_and_saved(make_policy, train, tmp_path)
    after = make_policy(weight_decay=0.5, betas=(0.8, 0.9), eps=1e-6)
    after.restore(tmp_path)
    then, now = before._optimizer, after._optimizer
    assert [group["weight_decay"] for group in now.param_groups] == [0.5, 0.0]
    assert [(group["betas"], group["eps"]) for group in now.param_groups] == [((0.8, 0.9), 1e-6)] * 2
    for old, new in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(then.state[old]["exp_avg"].full_tensor(), now.state[new]["exp_avg"].full_tensor())


def moments(policy: Policy) -> dict[str, torch.Tensor]:
    states = {name: policy._optimizer.state.get(value, {}) for name, value in policy.model.named_parameters()}
    return {
        f"{name}.{key}": getattr(value, "full_tensor", lambda value=value: value)().clone()
        for name, state in states.items()
        for key, value in state.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_goes_on_as_the_one_before(family: str, tmp_path: Path) -> None:
    """Also where the model has parameters that its forward leaves out, as the last layer of a LLaVA's tower."""
    config = config_of(build(family, tmp_path / "model"), weight_decay=0.5)
    processor = PromptProcessor(config.model.path)
    groups = [group(processor, sample(0, "what is this?", [image_bytes(1)]), (3, 2))]
    packs = pack_batch(groups, centred(groups), filler=processor.filler)
    parts = [[encode_packs(pack) for pack in packs]]
    with join_ranks("cpu") as ranks:
        before, after = Policy(config, ranks), Policy(config, ranks)
        before.step(parts)
        before.save(tmp_path, {})
        before.finish()
        assert after.restore(tmp_path) == {"version": 1}
        for _ in range(2):
            for of_policy in (parameters, moments):
                expected, resumed = of_policy(before), of_policy(after)
                assert expected.keys() == resumed.keys()
                assert [name for name, value in expected.items() if not torch.equal(value, resumed[name])] == []
            before.step(parts)
            after.step(parts)


def test_a_checkpoint_without_a_parameter_of_the_model_is_refused(
    make_policy: Callable[[], Policy], train: Train, tmp_path: Path
) -> None:
    trained_and_saved(make_policy, train, tmp_path)
    again = make_policy()
    again.model.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ConfigError, match=r"step-000001: more was not trained there and trains in this run; train the"):
        again.restore(tmp_path)


def test_a_checkpoint_of_another_rank_of_the_adapter_is_refused(model_dir: Path, tmp_path: Path) -> None:
    config = config_of(model_dir)
    of_rank = [config.model_copy(update={"model": config.model.model_copy(update={"lora_rank": r})}) for r in (2, 4)]
    with join_ranks("cpu") as ranks:
        before, after = (Policy(config, ranks) for config in of_rank)
        before.save(tmp_path, {})
        before.finish()
        with pytest.raises(
            ConfigError, match=r"lora_A\S* has shape \(2, \d+\) there and \(4, \d+\) in this run; train"
        ):
            after.restore(tmp_path)


def test_a_checkpoint_that_cannot_be_read_is_one_line(
    make_policy: Callable[[], Policy], train: Train, tmp_path: Path
) -> None:
    trained_and_saved(make_policy, train, tmp_path)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    next(checkpoint.glob("*.distcp")).write_bytes(b"")
    with pytest.raises(
        OSError, match=r"^.*step-000001 cannot be read: EOFError.*; without it the run resumes from .*$"
    ):
        make_policy().restore(tmp_path)


def test_what_trained_and_does_not_train_any_more_is_not_dropped(
    make_policy: Callable[..., Policy], train: Train, tmp_path: Path
) -> None:
    trained_and_saved(make_policy, train, tmp_path)
    again = make_policy()
    name, parameter = next(iter(again.model.named_parameters()))
    parameter.requires_grad = False
    with pytest.raises(ConfigError, match=f"{name} was trained there and does not train in this run"):
        again.restore(tmp_path)


def test_a_rank_that_does_not_see_the_checkpoint_says_so(
    make_policy: Callable[[], Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy()
    missing = tmp_path / "checkpoints" / "step-000007"
    monkeypatch.setattr(Ranks, "broadcast", lambda *_: str(missing).encode())
    with pytest.raises(
        ConfigError, match=f"{missing}: the run goes on from this checkpoint, and rank 0 does not see it"
    ):
        policy.restore(tmp_path)
    assert policy.version == 0


@pytest.mark.parametrize("room", [0, 100_000], ids=["nothing is written", "a part is written"])
def test_a_full_disk_leaves_the_checkpoint_before(
    make_policy: Callable[[], Policy], train: Train, tmp_path: Path, room: int
) -> None:
    policy = trained_and_saved(make_policy, train, tmp_path)
    train(policy)
    with full_disk(room):
        policy.save(tmp_path, {})
        with pytest.raises(OSError, match="rank 0 could not write its part of the checkpoint"):
            policy.finish()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert read_state(latest)["version"] == 1
    policy.save(tmp_path, {})
    policy.finish()
    again = make_policy()
    assert again.restore(tmp_path) == {"version": 2}


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(
    make_policy: Callable[[], Policy], train: Train, tmp_path: Path
) -> None:
    policy = make_policy()
    train(policy)
    with full_disk(0):
        policy.save(tmp_path, {})
        writing = policy._checkpoints._writing
        assert writing is not None
        concurrent.futures.wait([writing])
    with pytest.raises(OSError, match="rank 0 could not write its part of the checkpoint"):
        train(policy)
    assert policy.version == 1


def test_a_checkpoint_is_told_of_once_it_is_on_disk(
    make_policy: Callable[[], Policy], train: Train, tmp_path: Path
) -> None:
    policy = make_policy()
    with structlog.testing.capture_logs() as logs:
        with full_disk(0), contextlib.suppress(OSError):
            policy.save(tmp_path, {})
            policy.finish()
        train(policy)
        path = policy.save(tmp_path, {})
        policy.finish()
    assert [(entry["event"], entry["path"]) for entry in logs] == [("checkpoint", str(path))]


def test_ranks_wait_for_a_slow_disk_as_long_as_for_anything_else(make_policy: Callable[[], Policy]) -> None:
    backend = make_policy()._checkpoints._group._get_backend(torch.device("cpu"))
    assert backend.options._timeout == TIMEOUT


def test_what_the_source_says_of_sampling_goes_along_unread(model_dir: Path, tmp_path: Path) -> None:
    """As in many public checkpoints: transformers itself would refuse to write it."""
    from transformers import AutoModelForImageTextToText

    source = shutil.copytree(model_dir, tmp_path / "source")
    text = '{\n  "temperature": 0.2, "top_p": 0.9, "eos_token_id": [257]\n}'
    (source / "generation_config.json").write_text(text)
    with join_ranks("cpu") as ranks:
        export = Policy(config_of(source), ranks).export(tmp_path / "export")
    assert (export / "generation_config.json").read_text() == text
    loaded = AutoModelForImageTextToText.from_pretrained(export)
    assert loaded.generation_config.eos_token_id == [257]


def test_an_export_says_nothing_of_sampling_where_the_source_does_not(model_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model_dir, tmp_path / "source", ignore=shutil.ignore_patterns("generation_config.json"))
    with join_ranks("cpu") as ranks:
        export = Policy(config_of(source), ranks).export(tmp_path / "export")
    assert {path.name for path in export.iterdir()} == {path.name for path in source.iterdir()}


def test_an_export_of_a_read_only_source_can_be_written_to(model_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model_dir, tmp_path / "source")
    (source / "more" / "deeper").mkdir(parents=True)
    (source / "more" / "deeper" / "notes.txt").write_text("kept")
    (source / ".cache").mkdir()
    for path in (source, *source.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with join_ranks("cpu") as ranks:
        export = Policy(config_of(source), ranks).export(tmp_path / "export")
    for path in (source, *source.rglob("*")):
        path.chmod(0o755)  # for whoever clears up
    assert (export / "more" / "deeper" / "notes.txt").read_text() == "kept"
    assert not (export / ".cache").exists()
    assert [path for path in (export, *export.rglob("*")) if not path.stat().st_mode & stat.S_IWUSR] == []


def test_the_adapter_of_an_earlier_run_is_not_the_one_of_this_run(model_dir: Path, tmp_path: Path) -> None:
    """A run may begin with the export of another."""
    source = shutil.copytree(model_dir, tmp_path / "source")
    (source / "adapter").mkdir()
    (source / "adapter" / "README.md").write_text("of another run")
    with join_ranks("cpu") as ranks:
        whole = Policy(config_of(source), ranks).export(tmp_path / "whole")
        config = config_of(source)
        lora = config.model_copy(update={"model": config.model.model_copy(update={"lora_rank": 2})})
        adapted = Policy(lora, ranks).export(tmp_path / "adapted")
    assert not (whole / "adapter").exists()
    assert {path.name for path in (adapted / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_an_export_can_be_read_by_whom_the_umask_lets(umask: int, mode: int, model_dir: Path, tmp_path: Path) -> None:
    """A server of another user, say; safetensors writes its files for their owner alone."""
    config = config_of(model_dir)
    lora = config.model_copy(update={"model": config.model.model_copy(update={"lora_rank": 2})})
    before = os.umask(umask)
    try:
        with join_ranks("cpu") as ranks:
            export = Policy(lora, ranks).export(tmp_path / "export")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in export.rglob("*") if path.is_file()}
    assert {"model.safetensors", "adapter_model.safetensors", "config.json"} <= modes.keys()
    assert modes == dict.fromkeys(modes, mode)


def test_what_a_kill_has_cut_off_is_removed(tmp_path: Path) -> None:
    whole, partial = (tmp_path / "checkpoints" / name for name in ("step-000004", ".step-000005.partial"))
    for path in (whole, partial):
        path.mkdir(parents=True)
        (path / "0_0.distcp").touch()
    drop_partial(tmp_path)
    assert [*whole.parent.iterdir()] == [whole]
    drop_partial(tmp_path / "new")
