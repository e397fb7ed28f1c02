"""The policy as a whole, on one rank."""

import contextlib
import copy
import dataclasses
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.types import FloatArray
from learner.algorithms.losses import k3
from learner.batch.pack_bytes import encode_packs
from learner.batch.packing import pack_batch
from learner.batch.processing import PromptProcessor
from learner.config import LearnerConfig, TrainerConfig
from learner.data.ledger import Ledger
from learner.evaluate import Evaluation
from learner.model.load import load_policy
from learner.model.logprobs import completion_logprobs
from learner.model.parts import vision_parts
from learner.reporting.report import Progress, Reporter
from learner.reporting.summary import Summary
from learner.rollouts.dispatcher import TooManyDrops
from learner.stopping import RunFailed, StopRequest
from learner.storage.checkpoint import CheckpointWriter, latest_checkpoint
from learner.training.distributed import join_ranks
from learner.training.policy import Policy
from learner.training.step import StepStats, merge_stats
from learner.training.trainer import ParityError, RankZero, Trainer
from learner.types import Group
from learner.weights.snapshot import Snapshotter
from tests.helpers.families import FAMILIES, build
from tests.helpers.groups import centred, mixed_groups, reference_logits


@pytest.mark.parametrize("fused", [False, True])
def test_the_kl_term_is_that_to_the_checkpoint_that_the_run_began_with(
    tmp_path: Path, reference_model: Any, hf_processor: Any, processor: PromptProcessor, fused: bool
) -> None:
    reference_model.save_pretrained(tmp_path)
    config = LearnerConfig.model_validate(
        {
            "model": {"path": tmp_path, "use_fused_kernels": fused},
            "data": {"train": "unused"},
            "trainer": {"total_steps": 10, "batch_prompts": 2},
            "optimizer": {"lr": 1e-2, "schedule": "constant", "warmup_steps": 0},
            "algorithm": {"kl_coef": 0.1},
        }
    )
    groups = mixed_groups(processor)
    packs = pack_batch(groups, centred(groups), max_tokens=10_000, filler=processor.filler)
    with join_ranks("cpu") as ranks:
        policy = Policy(config, ranks)
        ((first,),) = policy.step([[encode_packs(packs[0])]])
        assert first.reference_kl == pytest.approx(0.0, abs=1e-9)
        assert all(isinstance(parameter, DTensor) for parameter in policy._reference.parameters()), "left whole"
        policy.step([[encode_packs(packs[0])]])
        (pack,) = packs[0]
        with torch.no_grad():
            now, _ = completion_logprobs(policy.model, pack, suppressed_token_ids=policy.placeholder_ids)
            rows = []
            for group in groups:
                for completion in group.completions:
                    logits = reference_logits(reference_model, hf_processor, group, completion).float()
                    logits[:, list(policy.placeholder_ids)] = -torch.inf
                    chosen = torch.from_numpy(completion.token_ids).long()[:, None]
                    rows.append(torch.log_softmax(logits, -1).gather(1, chosen).squeeze(1))
            began = torch.cat(rows)
        ((third,),) = policy.step([[encode_packs(packs[0])]])
        assert third.reference_kl == pytest.approx(float(k3(began - now).mean()), rel=1e-3)
        assert third.reference_kl > 1e-4


def parts_of(groups: list[Group], advantages: list[FloatArray], processor: PromptProcessor) -> list[Tensor]:
    return [encode_packs(packs) for packs in pack_batch(groups, advantages, filler=processor.filler)]


@pytest.mark.parametrize("old_policy", ["learner", "actor"])
def test_mini_batches_and_epochs_are_those_of_a_naive_loop(
    tmp_path: Path, reference_model: Any, hf_processor: Any, processor: PromptProcessor, old_policy: str
) -> None:
    reference_model.save_pretrained(tmp_path)
    config = LearnerConfig.model_validate(
        {
            "model": {"path": tmp_path},
            "data": {"train": "unused"},
            "trainer": {"total_steps": 10, "batch_prompts": 4, "mini_batch_prompts": 2, "epochs": 2},
            "optimizer": {"lr": 1e-3, "max_grad_norm": 1e6},
            "algorithm": {"old_policy": old_policy, "clip_low": 0.05, "clip_high": 0.1},
        }
    )
    groups = mixed_groups(processor)
    advantages = centred(groups)
    mini_batches = [(groups[i : i + 2], advantages[i : i + 2]) for i in (0, 2)]
    with join_ranks("cpu") as ranks:
        policy = Policy(config, ranks)
        placeholders = list(policy.placeholder_ids)
        updates = policy.step([parts_of(*mini_batch, processor) for mini_batch in mini_batches])
        assert policy.version == 1

    model = copy.deepcopy(reference_model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def logprobs(group: Group) -> list[Tensor]:
        rows = []
        for completion in group.completions:
            logits = reference_logits(model, hf_processor, group, completion)
            logits = logits.index_fill(1, torch.tensor(placeholders), -torch.inf)
            chosen = torch.from_numpy(completion.token_ids).long()[:, None]
            rows.append(torch.log_softmax(logits, -1).gather(1, chosen).squeeze(1))
        return rows

    with torch.no_grad():
        began = {group.group_id: logprobs(group) for group in groups}
    expected = []
    for _ in range(2):
        for of_groups, of_advantages in mini_batches:
            losses = []
            for group, values in zip(of_groups, of_advantages, strict=True):
                for i, now in enumerate(logprobs(group)):
                    actor = torch.from_numpy(group.completions[i].logprobs)
                    old = began[group.group_id][i] if old_policy == "learner" else actor
                    for token in range(len(now)):
                        ratio, value = (now[token] - old[token]).exp(), float(values[i])
                        losses.append(-torch.min(ratio * value, ratio.clamp(0.95, 1.1) * value))
            loss = torch.stack(losses).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
    in_order = [updates[0][0], updates[1][0], updates[0][1], updates[1][1]]
    assert [update.loss for update in in_order] == pytest.approx(expected, rel=2e-3, abs=1e-5)
    sizes = [
        sum(len(each.token_ids) for group in of_groups for each in group.completions) for of_groups, _ in mini_batches
    ]
    compared = sizes if old_policy == "learner" else [sizes[0], 0]
    assert [update.parity_tokens for update in in_order] == [*compared, 0, 0]
    differences = [
        np.abs(began[group.group_id][i].numpy() - completion.logprobs)
        for of_groups, _ in mini_batches[: sum(size > 0 for size in compared)]
        for group in of_groups
        for i, completion in enumerate(group.completions)
    ]
    merged = merge_stats(updates)
    assert merged.parity_mean_abs_diff == pytest.approx(np.concatenate(differences).mean(), rel=1e-4)
    assert merged.parity_max_abs_diff == pytest.approx(np.concatenate(differences).max(), rel=1e-4)
    if old_policy == "learner":
        assert in_order[0].ratio_mean == pytest.approx(1.0, abs=1e-6)
        assert in_order[2].clip_fraction > 0
    assert (merged.num_tokens, merged.num_sequences) == (31, 11)  # though the optimizer goes over them twice
    assert merged.num_input_tokens == sum(update.num_input_tokens for update in in_order)
    assert (merged.num_updates, merged.num_skipped) == (4, 0)
    assert merged.loss == pytest.approx(
        sum(update.loss * update.num_tokens for update in in_order) / (2 * 31), rel=1e-6
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_layers_take_the_same_step(model_dir: Path, processor: PromptProcessor) -> None:
    groups = mixed_groups(processor)
    stats = []
    with join_ranks("cpu") as ranks:
        for compiled in (False, True):
            config = LearnerConfig.model_validate(
                {
                    "model": {"path": model_dir, "use_torch_compile": compiled},
                    "data": {"train": "unused"},
                    "trainer": {"total_steps": 2, "batch_prompts": 4},
                }
            )
            policy = Policy(config, ranks)
            stats.append([policy.step([parts_of(groups, centred(groups), processor)])[0][0] for _ in range(2)])
    for plain, compiled_step in zip(*stats, strict=True):
        assert compiled_step.loss == pytest.approx(plain.loss, rel=1e-5)
        assert compiled_step.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)


def test_groups_of_a_skipped_mini_batch_are_dropped_and_the_others_trained(
    tmp_path: Path, model_dir: Path, processor: PromptProcessor
) -> None:
    config = LearnerConfig.model_validate(
        {
            "model": {"path": model_dir},
            "data": {"train": "unused"},
            "trainer": {"total_steps": 1, "batch_prompts": 4, "mini_batch_prompts": 1, "max_mean_parity_diff": None},
        }
    )
    groups = [
        dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, suppressed_token_ids=(262, 263)))
        for group in mixed_groups(processor)
    ]
    groups[2].completions[0].logprobs[0] = np.nan
    control = MagicMock(processor=processor)
    control.take_batch.return_value = groups
    control.evaluate.return_value = None
    with join_ranks("cpu") as ranks:
        zero = RankZero(control, Ledger(0, 4), MagicMock(**{"state.return_value": {}}))
        Trainer(config, ranks, Policy(config, ranks), tmp_path, zero).run()
    (call,) = control.finish_step.call_args_list
    assert call.args[0] == groups
    assert call.kwargs["skipped"] == [groups[2]]


def test_tokens_behind_a_skipped_update_are_still_those_of_the_policy(
    model_dir: Path, processor: PromptProcessor
) -> None:
    config = LearnerConfig.model_validate(
        {
            "model": {"path": model_dir},
            "data": {"train": "unused"},
            "trainer": {"total_steps": 1, "batch_prompts": 4, "mini_batch_prompts": 1, "epochs": 2},
        }
    )
    groups = mixed_groups(processor)
    groups[0].completions[0].logprobs[0] = np.nan
    with join_ranks("cpu") as ranks:
        updates = Policy(config, ranks).step(
            [parts_of([group], values, processor) for group, values in zip(groups, zip(centred(groups)), strict=True)]
        )
    assert [[update.skipped for update in epochs] for epochs in updates] == [[True] * 2, *[[False] * 2] * 3]
    assert [[update.parity_tokens for update in epochs] for epochs in updates] == [[8, 0], [8, 0], [0, 0], [0, 0]]


def update_stats(**values: Any) -> StepStats:
    """Of an update of 10 tokens; `skipped` says whether it was made."""
    zeros: dict[str, Any] = {field.name: 0.0 for field in dataclasses.fields(StepStats)}
    counts = {"num_updates": int(not values.get("skipped")), "num_skipped": int(values.get("skipped", False))}
    return StepStats(**zeros | {"skipped": False, "num_tokens": 10, "parity_tokens": 0} | counts | values)


def train_on(tmp_path: Path, steps: list[list[list[StepStats]]], **trainer: Any) -> int:
    """The trainer on one rank that is not the main one; what the steps do is made up. The steps that it took."""
    settings = {"total_steps": len(steps), "batch_prompts": 1} | trainer
    config = LearnerConfig.model_validate({"model": {"path": "m"}, "data": {"train": "t"}, "trainer": settings})
    policy = MagicMock(version=0)

    def step(_: None) -> list[list[StepStats]]:
        policy.version += 1
        return steps[policy.version - 1]

    policy.step.side_effect = step
    Trainer(config, MagicMock(**{"any.return_value": False}), policy, tmp_path, None).run()
    return int(policy.version)


def updates_of(pattern: str, *, epochs: int = 1) -> list[list[StepStats]]:
    """A step by its updates in order: `x` was skipped, `.` was not."""
    in_order = [update_stats(skipped=letter == "x") for letter in pattern]
    num_mini_batches = len(pattern) // epochs
    return [in_order[i::num_mini_batches] for i in range(num_mini_batches)]


@pytest.mark.parametrize(
    ("patterns", "epochs", "skipped"),
    [
        (["x", "x", ".", "x", "x"], 1, None),
        (["x", ".", "x", "x", "x"], 1, 3),
        (["xxxx", "xxxx", "x.xx", "xxxx"], 1, None),
        ([".xxx", "xxxx", "xxx."], 1, 10),  # no step is skipped as a whole but one
        (["xx..", "xxxx", "xx.x"], 2, None),  # in the order of the epochs: 2, then 6
        (["..xx", "xxxx", "xxxx"], 2, 10),
        (["x" * 12], 3, 10),
    ],
)
def test_a_run_that_only_skips_updates_ends(
    tmp_path: Path, patterns: list[str], epochs: int, skipped: int | None
) -> None:
    steps = [updates_of(pattern, epochs=epochs) for pattern in patterns]
    if skipped is None:
        assert train_on(tmp_path, steps) == len(patterns)
        return
    told = f"step {len(patterns) - 1}: loss or gradient of {skipped} optimizer updates in a row was not finite"
    with pytest.raises(RunFailed, match=told) as failure:
        train_on(tmp_path, steps)
    assert "\n" not in str(failure.value)


def parity(mean: float, tokens: int) -> StepStats:
    return update_stats(parity_mean_abs_diff=mean, parity_tokens=tokens, skipped=bool(np.isnan(mean)))


@pytest.mark.parametrize(
    ("steps", "mean"),
    [
        ([[parity(9.0, 63)]], None),  # too few to say anything
        ([[parity(9.0, 1), parity(0.1, 100)]], None),
        ([[parity(0.1, 100), parity(2.0, 50)]], "0.73"),
        ([[parity(0.6, 32)], [parity(0.6, 32)]], "0.6"),  # no step has enough
        ([[parity(0.3, 63)], [parity(0.3, 63)], [parity(0.9, 63)]], None),  # of the last alone
        ([[parity(np.nan, 100), parity(0.7, 64)]], "0.7"),
        ([[parity(np.nan, 100)], [parity(0.7, 64)]], "0.7"),
        ([[parity(np.inf, 64)]], "inf"),
    ],
)
def test_the_mean_difference_to_the_actors_is_that_over_enough_tokens(
    tmp_path: Path, steps: list[list[StepStats]], mean: str | None
) -> None:
    nested = [[[update] for update in step] for step in steps]
    if mean is None:
        assert train_on(tmp_path, nested) == len(steps)
        return
    with pytest.raises(ParityError, match=f"step {len(steps) - 1}: .* differ by {mean} on average"):
        train_on(tmp_path, nested)


def test_the_updates_of_a_step_are_counted() -> None:
    merged = merge_stats(updates_of("x...x.", epochs=2))
    assert (merged.skipped, merged.num_updates, merged.num_skipped) == (False, 4, 2)
    merged = merge_stats(updates_of("xx"))
    assert (merged.skipped, merged.num_updates, merged.num_skipped) == (True, 0, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_image_passes_is_all_but_the_text_model(family: str, tmp_path: Path) -> None:
    """Also a parameter that belongs to no module: a LLaVA's newline, which ends each row of patches."""
    model, _ = load_policy(build(family, tmp_path))
    parts = tuple(f"{part}." for part in vision_parts(model))
    rest = {name for name, _ in model.named_parameters() if not f"{name}.".startswith(parts)}
    assert rest
    assert all(name.startswith(("model.language_model.", "model.text_model.", "lm_head.")) for name in rest)
    newline = dict(model.named_parameters()).get("model.image_newline")
    assert (newline is not None) == (family in {"llava_next", "llava_onevision"})
    if newline is not None:
        model.requires_grad_(False)
        newline.requires_grad_(True)
        taken = Snapshotter(model, vision_parts(model), is_sender=True, bucket_bytes=2**20).take(1)
        assert taken is not None
        assert taken.update(full=False)[0].updates_vision


def one_step(
    model_dir: Path, processor: PromptProcessor, max_mean_parity_diff: float | None = None
) -> tuple[LearnerConfig, MagicMock]:
    """A run of one step, and what stands in for its actors: their logprobs are made up."""
    config = LearnerConfig.model_validate(
        {
            "model": {"path": model_dir},
            "data": {"train": "unused"},
            "trainer": {"total_steps": 1, "batch_prompts": 4, "max_mean_parity_diff": max_mean_parity_diff},
        }
    )
    control = MagicMock(processor=processor)
    control.take_batch.return_value = [
        dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, suppressed_token_ids=(262, 263)))
        for group in mixed_groups(processor)
    ]
    return config, control


def test_a_resumed_run_makes_up_for_a_last_evaluation_that_failed(
    tmp_path: Path, model_dir: Path, processor: PromptProcessor
) -> None:
    config, control = one_step(model_dir, processor)

    def train(name: str, *evaluations: Evaluation | RuntimeError) -> Summary:
        """From the checkpoint, if there is one."""
        control.evaluate.side_effect = evaluations
        policy = Policy(config, ranks)
        state = policy.restore(tmp_path / name) or {"progress": {}}
        reporter = Reporter(MagicMock(), MagicMock(), Progress(**state["progress"]))
        zero = RankZero(control, Ledger(0, 4), reporter)
        return reporter.summary("", 0, 1, Trainer(config, ranks, policy, tmp_path / name, zero).run())

    first, last = Evaluation(0.25, 8, 4.0), Evaluation(0.75, 8, 4.0)
    with join_ranks("cpu") as ranks:
        with pytest.raises(RuntimeError, match="no actor answers"):
            train("failed", first, RuntimeError("no actor answers"))
        summary = train("failed", last)
        assert (summary.accuracy_before, summary.accuracy_after) == (0.25, 0.75)
        train("whole", first, last)
        assert train("whole").accuracy_after == 0.75  # it is not made again


def test_actors_that_compute_another_model_end_the_run(
    tmp_path: Path, model_dir: Path, processor: PromptProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up logprobs are about 3 off on average; of so few tokens that may be chance."""
    default = TrainerConfig(total_steps=1, batch_prompts=1).max_mean_parity_diff
    ends = pytest.raises(ParityError, match="on average")
    for limit, min_tokens, outcome in (
        (default, 64, contextlib.nullcontext()),
        (5.0, 1, contextlib.nullcontext()),
        (default, 1, ends),
    ):
        monkeypatch.setattr("learner.training.trainer._MIN_PARITY_TOKENS", min_tokens)
        config, control = one_step(model_dir, processor, limit)
        control.evaluate.return_value = None
        with join_ranks("cpu") as ranks, outcome:
            zero = RankZero(control, Ledger(0, 4), MagicMock(**{"state.return_value": {}}))
            Trainer(config, ranks, Policy(config, ranks), tmp_path, zero).run()


def test_a_stop_ends_an_evaluation_and_costs_no_step(
    tmp_path: Path, model_dir: Path, processor: PromptProcessor
) -> None:
    """That of the first policy, and that of the last, which the resumed run makes up for."""
    config, control = one_step(model_dir, processor)

    def train(stops_at: int | None) -> Reporter:
        """From the checkpoint, if there is one."""
        policy = Policy(config, ranks)
        state = policy.restore(tmp_path) or {"progress": {}}
        reporter = Reporter(MagicMock(), MagicMock(), Progress(**state["progress"]))
        stop = StopRequest()

        def evaluate(version: int, is_stopping: Callable[[], bool]) -> Evaluation | None:
            if version == stops_at:
                stop._signalled(signal.SIGTERM, None)
            return None if is_stopping() else Evaluation(version / 2, 8, 4.0)

        control.evaluate = evaluate
        ends = pytest.raises(KeyboardInterrupt) if stops_at is not None else contextlib.nullcontext()
        with ends:
            Trainer(config, ranks, policy, tmp_path, RankZero(control, Ledger(0, 4), reporter), stop).run()
        return reporter

    with join_ranks("cpu") as ranks:
        train(stops_at=0)
        assert latest_checkpoint(tmp_path) is None
        assert train(stops_at=1).evaluated_version == 0
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000001"
        assert not (tmp_path / "export").exists()
        assert train(stops_at=None).evaluated_version == 1
    assert control.finish_step.call_count == 1
    assert (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("is_asked", "num_ranks", "error", "told"),
    [
        (True, 2, RuntimeError("Connection closed by peer"), KeyboardInterrupt),
        (False, 2, RuntimeError("Connection closed by peer"), RuntimeError),
        (True, 1, RuntimeError("out of memory"), RuntimeError),
        (True, 2, ParityError("another model"), ParityError),
        (True, 2, TooManyDrops("every prompt is dropped"), TooManyDrops),
    ],
)
def test_a_stop_that_another_rank_could_not_wait_for_is_no_crash(
    tmp_path: Path, is_asked: bool, num_ranks: int, error: RuntimeError, told: type[BaseException]
) -> None:
    """One that had not begun to train has died of the signal."""
    stop, policy = StopRequest(), MagicMock(version=0)

    def snapshot(_publish: object) -> None:
        if is_asked:
            stop._signalled(signal.SIGTERM, None)
        raise error

    policy.snapshot.side_effect = snapshot
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(told):
            Trainer(MagicMock(), MagicMock(num_ranks=num_ranks), policy, tmp_path, None, stop).run()
    finally:
        signal.signal(signal.SIGTERM, before)
    policy.finish.assert_called_once_with()


def test_an_evaluation_that_fails_costs_no_checkpoint(
    tmp_path: Path, model_dir: Path, processor: PromptProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, control = one_step(model_dir, processor)
    control.evaluate.side_effect = [None, RuntimeError("no actor answers")]
    written = threading.Event()
    finish = CheckpointWriter._finish

    def slow_finish(*arguments: Any) -> None:
        assert not written.wait(0.5)  # a slow disk
        finish(*arguments)

    monkeypatch.setattr(CheckpointWriter, "_finish", slow_finish)
    with join_ranks("cpu") as ranks:
        zero = RankZero(control, Ledger(0, 4), MagicMock(**{"state.return_value": {}}))
        with pytest.raises(RuntimeError, match="no actor answers"):
            Trainer(config, ranks, Policy(config, ranks), tmp_path, zero).run()
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000001"
