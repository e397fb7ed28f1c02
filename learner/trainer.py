"""The training loop, on every rank.

    take_batch -> advantages -> pack -> scatter -> train_step -> snapshot -> publish -> (checkpoint) -> (evaluate)
     rank 0       rank 0        rank 0   all        all           all         rank 0     all             rank 0

| waits for | unblocked by |
|---|---|
| `take_batch` | enough finished groups, fresh enough |
| collectives of a step | the other ranks |
| `evaluate` | the held-out completions |

It never waits for the wire of a weight update: `publish` hands over a copy and returns. With `max_staleness = 0` the
next batch cannot start before its actors have the new version, so the same loop is then synchronous.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.log import get_logger
from common.placeholders import placeholder_ids
from learner.algorithms.advantages import group_advantages
from learner.batch.packing import PackedBatch, pack_batch
from learner.batch.transport import decode_packs, encode_packs
from learner.checkpoint import export_model, latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from learner.config import LearnerConfig
from learner.control import Control
from learner.display import Display, StepReport
from learner.distributed import Ranks
from learner.ledger import Ledger
from learner.model.config import learning_rate
from learner.model.load import load_policy, vision_modules
from learner.model.optimizer import build_optimizer
from learner.model.parallelize import parallelize
from learner.step import StepStats, train_step
from learner.summary import MetricsWriter, Summary
from learner.types import Group
from learner.weights.snapshot import Snapshotter

log = get_logger(__name__)

# Steps in a row without an update, for a gradient that is not finite, that end the run.
_MAX_SKIPPED_STEPS = 3


class ParityError(RuntimeError):
    """Learner and actor disagree about the probability of what the current policy sampled."""


@dataclass(slots=True)
class Progress:
    """What the summary is made of; survives in checkpoints. Rank 0's."""

    accuracy_before: float | None = None
    accuracy_after: float | None = None
    parity_max_abs_diff: float | None = None
    num_completions: int = 0
    step_s: float = 0.0
    wall_s: float = 0.0
    resumed_from: list[int] = field(default_factory=list)


class Policy:
    """Model and optimizer of this rank, with everything that is a collective over the ranks."""

    def __init__(self, config: LearnerConfig, ranks: Ranks) -> None:
        torch.manual_seed(config.seed)
        settings = config.model
        self.model, self.freeze_report = load_policy(
            settings.path,
            dtype=getattr(torch, settings.dtype),
            freeze_vision_tower=settings.freeze_vision_tower,
            gradient_checkpointing=settings.enable_gradient_checkpointing,
        )
        self.model.to(ranks.device)
        self.placeholder_ids = placeholder_ids(self.model.config)
        self._suppressed_token_ids = suppressed_token_ids(
            self.placeholder_ids, config.rollout.allowed_token_ids, self.model.config.get_text_config().vocab_size
        )
        parallelize(self.model, ranks.mesh, compute_dtype=torch.bfloat16 if settings.compute_bfloat16 else None)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.snapshotter = Snapshotter(
            self.model,
            vision_modules(self.model),
            is_sender=ranks.is_main,
            bucket_bytes=config.weights.bucket_mib * 2**20,
        )
        self._config = config
        self._ranks = ranks

    def step(self, parts: list[torch.Tensor] | None, version: int) -> StepStats:
        """One optimizer step; `parts` are rank 0's packs for each rank."""
        return train_step(
            self.model,
            self.optimizer,
            decode_packs(self._ranks.scatter(parts)),
            self._config.algorithm,
            policy_version=version,
            temperature=self._config.rollout.temperature,
            suppressed_token_ids=self._suppressed_token_ids,
            max_grad_norm=self._config.optimizer.max_grad_norm,
            learning_rate=learning_rate(version, self._config.trainer.total_steps, self._config.optimizer),
        )


def restore(policy: Policy, run_dir: Path) -> dict[str, Any] | None:
    """Load the newest checkpoint of the run, if there is one; its state. A collective."""
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        return None
    load_checkpoint(checkpoint, policy.model, policy.optimizer)
    return read_state(checkpoint)


class Trainer:
    """Runs the loop on one rank. `control`, `display` and `metrics` are rank 0's, and None elsewhere."""

    def __init__(
        self,
        config: LearnerConfig,
        ranks: Ranks,
        policy: Policy,
        run_dir: Path,
        *,
        version: int,
        progress: Progress,
        ledger: Ledger | None = None,
        control: Control | None = None,
        display: Display | None = None,
        metrics: MetricsWriter | None = None,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._policy = policy
        self._run_dir = run_dir
        self._version = version
        self._progress = progress
        self._ledger = ledger
        self._control = control
        self._display = display
        self._metrics = metrics
        self._num_skipped = 0
        self._started_at = time.monotonic() - progress.wall_s

    def run(self) -> Path:
        """Train to the last step; the directory of the final export."""
        settings = self._config.trainer
        first = self._policy.snapshotter.take(self._version)
        if self._control is not None and first is not None:
            self._control.publish(first)
        if self._version == 0:
            self._evaluate()
        while self._version < settings.total_steps:
            self._step()
            is_last = self._version == settings.total_steps
            if is_last or _is_due(self._version, settings.eval_every):
                self._evaluate()
            if is_last or _is_due(self._version, settings.checkpoint_every):
                self._checkpoint()
        return export_model(self._policy.model, self._config.model.path, self._run_dir / "export")

    def summary(self, export: Path) -> Summary:
        """The run in numbers."""
        progress = self._progress
        return Summary(
            name=self._config.name,
            steps=self._version,
            accuracy_before=progress.accuracy_before,
            accuracy_after=progress.accuracy_after,
            completions_per_s=progress.num_completions / max(progress.step_s, 1e-9),
            parity_max_abs_diff=progress.parity_max_abs_diff,
            wall_s=time.monotonic() - self._started_at,
            checkpoint=str(export),
            extra={"resumed_from": progress.resumed_from, "seed": self._config.seed},
        )

    # ------------------------------------------------------------------------------------------------ one step

    def _step(self) -> None:
        started_at = time.monotonic()
        version = self._version
        groups = self._control.take_batch(version) if self._control is not None else []
        taken_at = time.monotonic()
        stats = self._policy.step(self._pack(groups), version)
        self._num_skipped = self._num_skipped + 1 if stats.skipped else 0
        if self._num_skipped == _MAX_SKIPPED_STEPS:
            raise RuntimeError(
                f"the gradient of {self._num_skipped} steps in a row was not finite; lower optimizer.lr, or look at the "
                "rewards and the data (metrics.jsonl has the steps)"
            )
        snapshot = self._policy.snapshotter.take(version + 1)
        self._version += 1
        if self._control is not None and snapshot is not None:
            trained_at = time.monotonic()
            self._control.finish_step(groups, self._version, snapshot)
            self._report(groups, stats, step_s=trained_at - started_at, wait_s=taken_at - started_at)
        limit = self._config.trainer.max_parity_diff
        if limit is not None and stats.parity_max_abs_diff > limit:
            raise ParityError(
                f"step {version}: a logprob of learner and actor differs by {stats.parity_max_abs_diff:.2e}, more than "
                f"trainer.max_parity_diff ({limit:.0e}): what is trained is not what was sampled"
            )

    def _pack(self, groups: list[Group]) -> list[torch.Tensor] | None:
        """Rank 0: the batch as one flat tensor for each rank."""
        if self._control is None:
            return None
        for group in groups:
            if group.prompt.suppressed_token_ids != self._policy.placeholder_ids:
                raise ParityError(
                    f"the actor masks the placeholder ids {group.prompt.suppressed_token_ids}, the learner "
                    f"{self._policy.placeholder_ids}: they run different models"
                )
        advantages = [group_advantages(group.rewards, self._config.algorithm.advantage) for group in groups]
        packs: list[list[PackedBatch]] = pack_batch(
            groups,
            advantages,
            num_ranks=self._ranks.num_ranks,
            max_tokens=self._config.trainer.max_tokens_per_micro_batch,
            filler=self._control.processor.filler,
            hidden_size=self._policy.model.config.get_text_config().hidden_size,
        )
        return [encode_packs(of_rank) for of_rank in packs]

    def _report(self, groups: list[Group], stats: StepStats, *, step_s: float, wait_s: float) -> None:
        assert self._control is not None and self._display is not None and self._metrics is not None
        progress = self._progress
        num_completions = sum(len(group.completions) for group in groups)
        reward = float(sum(group.rewards.sum() for group in groups)) / num_completions
        staleness = sum(self._version - 1 - group.oldest_version for group in groups) / len(groups)
        parity = stats.parity_max_abs_diff if stats.parity_tokens else None
        progress.num_completions += num_completions
        progress.step_s += step_s
        if parity is not None:
            progress.parity_max_abs_diff = max(parity, progress.parity_max_abs_diff or 0.0)
        self._display.step(
            StepReport(
                step=self._version,
                reward=reward,
                completions_per_s=num_completions / step_s,
                staleness=staleness,
                parity=parity,
                step_s=step_s,
                loss=stats.loss,
                entropy=stats.entropy,
            )
        )
        dispatch = self._control.stats()
        self._metrics.write(
            {
                "step": self._version,
                "reward": reward,
                "completions_per_s": num_completions / step_s,
                "staleness": staleness,
                "parity_max_abs_diff": parity,
                "parity_mean_abs_diff": stats.parity_mean_abs_diff,
                "parity_tokens": stats.parity_tokens,
                "loss": stats.loss,
                "entropy": stats.entropy,
                "grad_norm": stats.grad_norm,
                "clip_fraction": stats.clip_fraction,
                "kl": stats.kl,
                "learning_rate": stats.learning_rate,
                "skipped": stats.skipped,
                "num_tokens": stats.num_tokens,
                "num_input_tokens": stats.num_input_tokens,
                "step_s": step_s,
                "wait_s": wait_s,
                "groups_dropped": dispatch.dropped,
                "groups_resent": dispatch.retries,
                "sequences": [group.sequence for group in groups],
                "wall_s": time.monotonic() - self._started_at,
            }
        )

    # ------------------------------------------------------------------------------------------------ now and then

    def _evaluate(self) -> None:
        if self._control is None or self._display is None or self._metrics is None:
            return
        self._display.phase("evaluating")
        result = self._control.evaluate(self._version)
        self._display.phase("training")
        if result is None:
            return
        if self._version == 0:
            self._progress.accuracy_before = result.accuracy
        self._progress.accuracy_after = result.accuracy
        self._display.accuracy(self._version, result.accuracy)
        self._metrics.write(
            {
                "step": self._version,
                "accuracy": result.accuracy,
                "eval_rows": result.num_rows,
                "eval_tokens": result.mean_tokens,
            }
        )

    def _checkpoint(self) -> None:
        state: dict[str, Any] = {}
        if self._ledger is not None:
            self._progress.wall_s = time.monotonic() - self._started_at
            state = {"ledger": self._ledger.to_dict(), "progress": _as_dict(self._progress)}
        path = save_checkpoint(
            self._run_dir,
            self._version,
            self._policy.model,
            self._policy.optimizer,
            state,
            keep=self._config.trainer.keep_checkpoints,
        )
        log.info("checkpoint", path=str(path))


def suppressed_token_ids(placeholders: Sequence[int], allowed: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Ids that the actors cannot sample: the placeholders of media and, with a list of allowed ids, all others."""
    if not allowed:
        return tuple(placeholders)
    return tuple(sorted((set(range(vocab_size)) - set(allowed)) | set(placeholders)))


def _is_due(version: int, every: int) -> bool:
    return every > 0 and version % every == 0


def _as_dict(progress: Progress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in progress.__slots__}
