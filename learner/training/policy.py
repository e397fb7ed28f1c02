"""Model and optimizer of one rank, with everything that is a collective over the ranks."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.config import ConfigError, NotYet
from common.media.placeholders import placeholder_ids
from learner.batch.pack_bytes import decode_packs
from learner.batch.packing import PackedBatch
from learner.config import LearnerConfig
from learner.model.load import load_policy, model_cost
from learner.model.logprobs import check_fused, completion_logprobs
from learner.model.lora import without_adapter
from learner.model.optimizer import build_optimizer, learning_rate
from learner.model.parallelize import parallelize
from learner.model.parts import text_model, vision_parts
from learner.model.sequence_parallel import split_sequences
from learner.storage.checkpoint import CheckpointWriter, export_model, latest_checkpoint, load_checkpoint, read_state
from learner.training.distributed import Ranks
from learner.training.step import StepStats, train_step
from learner.weights.snapshot import Snapshot, Snapshotter

# In place of a path, which is longer.
_NO_CHECKPOINT = "-"


class Policy:
    """What trains. `version` is the number of batches that it has been trained on: steps of a run."""

    def __init__(self, config: LearnerConfig, ranks: Ranks) -> None:
        torch.manual_seed(config.seed)
        if config.model.cpu_offload and ranks.device.type == "cpu":
            raise ConfigError("model.cpu_offload moves what trains from a GPU to the CPU, and there is no GPU here")
        self._config = config
        self._ranks = ranks
        self.version = 0
        with ranks.in_turn():  # so that a node holds one whole model at a time, beside the shards
            self._load()
        self.placeholder_ids = placeholder_ids(self.model.config)
        vocab_size = self.model.config.get_text_config().vocab_size
        # Of every policy that a pack goes through, so that what is compared differs by the policies alone.
        self._forward = functools.partial(
            completion_logprobs,
            temperature=config.rollout.temperature,
            suppressed_token_ids=suppressed_token_ids(
                self.placeholder_ids, config.rollout.allowed_token_ids, vocab_size
            ),
            fused=config.model.use_fused_kernels,
            sequence_group=ranks.sequence_group,
        )
        self._optimizer = build_optimizer(self.model, config.optimizer)
        self._checkpoints = CheckpointWriter(self.model, self._optimizer, keep=config.trainer.keep_checkpoints)
        self._snapshotter = Snapshotter(
            self.model,
            vision_parts(self.model),
            is_sender=ranks.is_main,
            bucket_bytes=config.weights.bucket_mib * 2**20,
            dtype=torch.bfloat16 if config.weights.dtype is not None else None,
        )
        trainer = config.trainer
        self._needs_old_logprobs = (
            config.algorithm.old_policy == "learner" and trainer.num_mini_batches * trainer.epochs > 1
        )

    def _load(self) -> None:
        """Load and shard what trains, and the reference. No collective of the ranks may be in here."""
        settings = self._config.model
        self.model: Any
        self.model, self.freeze_report = load_policy(
            settings.path,
            dtype=getattr(torch, settings.dtype),
            frozen=settings.frozen,
            adapter=settings.adapter,
            gradient_checkpointing=settings.enable_gradient_checkpointing,
        )
        self.cost = model_cost(self.model)
        if settings.use_fused_kernels:
            check_fused(self.model)
        self._shard(self.model, compile_layers=settings.use_torch_compile)
        self._reference: Any = None
        if self._config.algorithm.kl_coef and settings.adapter is None:
            self._reference, _ = load_policy(settings.path, dtype=getattr(torch, settings.dtype))
            self._reference.requires_grad_(False)
            self._shard(self._reference)

    def _shard(self, model: Any, *, compile_layers: bool = False) -> None:
        settings = self._config.model
        split_sequences(model, text_model(model), self._ranks.sequence_group)
        parallelize(
            model,
            self._ranks.mesh,
            compute_dtype=torch.bfloat16 if settings.compute_bfloat16 else None,
            compile_layers=compile_layers,
            cpu_offload=settings.cpu_offload,
        )

    def step(self, parts: Sequence[Sequence[torch.Tensor]] | None) -> list[list[StepStats]]:
        """Train one batch, which gives the next version.

        `parts` are, for each mini-batch, rank 0's encoded packs for each rank; None on the other ranks. Returns the
        statistics of each update: for each mini-batch those of its epochs.

        Raises:
            OSError: the checkpoint before could not be written; a step now would only be lost too.
        """
        self._checkpoints.check()
        trainer = self._config.trainer
        mini_batches = [
            [self._annotated(pack) for pack in decode_packs(self._ranks.scatter(parts[i] if parts else None))]
            for i in range(trainer.num_mini_batches)
        ]
        if self._reference is not None:
            self._reference.reshard()  # the root, which FSDP2 leaves whole for a backward pass that does not come
        updates: list[list[StepStats]] = [[] for _ in mini_batches]
        is_of_version = True  # the logprobs that are compared; each token once
        for epoch in range(trainer.epochs):
            for i, packs in enumerate(mini_batches):
                stats = self._update(packs, has_parity=is_of_version and epoch == 0)
                is_of_version &= stats.skipped or self._needs_old_logprobs
                updates[i].append(stats)
        self.version += 1
        return updates

    def _update(self, packs: Sequence[PackedBatch], *, has_parity: bool) -> StepStats:
        """One optimizer step. `has_parity`: there are logprobs by `version`, to compare with those of the actors."""
        return train_step(
            self.model,
            self._optimizer,
            packs,
            self._config.algorithm,
            policy_version=self.version if has_parity else None,
            forward=self._forward,
            num_copies=self._config.trainer.sequence_parallel_size,
            max_grad_norm=self._config.optimizer.max_grad_norm,
            learning_rate=learning_rate(self.version, self._config.trainer.num_steps, self._config.optimizer),
        )

    def _annotated(self, pack: PackedBatch) -> PackedBatch:
        """The pack with what other policies than the current one make of it; a collective of its own."""
        if self._reference is not None:
            pack = dataclasses.replace(pack, reference_logprobs=self._logprobs(self._reference, pack))
        elif self._config.algorithm.kl_coef:
            with without_adapter(self.model):
                pack = dataclasses.replace(pack, reference_logprobs=self._logprobs(self.model, pack))
        if self._needs_old_logprobs:
            pack = dataclasses.replace(pack, old_logprobs=self._logprobs(self.model, pack))
        return pack

    @torch.no_grad()
    def _logprobs(self, model: Any, pack: PackedBatch) -> torch.Tensor:
        logprobs, _ = self._forward(model, pack.to(self._ranks.device))
        return logprobs

    def snapshot(self, publish: Callable[[Snapshot], None]) -> None:
        """Make a copy for the actors. `publish` is called with it on rank 0, before it is filled."""
        self._snapshotter.take(self.version, publish)

    def save(self, run_dir: Path, state: dict[str, Any]) -> Path:
        """Begin to write a checkpoint; `state` is rank 0's. Training may go on; `finish` waits for it."""
        return self._checkpoints.save(run_dir, self.version, state)

    def finish(self) -> None:
        """Wait until everything is written."""
        self._checkpoints.wait()

    def restore(self, run_dir: Path) -> dict[str, Any] | None:
        """Load the newest checkpoint of the run, if there is one; the `state` that was saved with it.

        Rank 0 says which that is: on a network file system the others may still see an older one as the newest. Raises
        NotYet on a rank that does not see it.
        """
        newest = str(latest_checkpoint(run_dir) or _NO_CHECKPOINT).encode() if self._ranks.is_main else None
        name = self._ranks.broadcast(newest).decode()
        if name == _NO_CHECKPOINT:
            return None
        checkpoint = Path(name)
        if not checkpoint.is_dir():
            raise NotYet(
                f"{checkpoint}: the run goes on from this checkpoint, and rank {self._ranks.rank} does not see it; all "
                "ranks need the run folder on a file system that they share"
            )
        state = read_state(checkpoint)
        load_checkpoint(checkpoint, self.model, self._optimizer)
        self.version = int(state["version"])
        return state

    def export(self, target: Path) -> Path:
        """Write a Hugging Face checkpoint directory; returns it."""
        return export_model(self.model, self._config.model.path, target)


def suppressed_token_ids(placeholders: Sequence[int], allowed: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Ids that the actors cannot sample: the placeholders of media and, with a list of allowed ids, all others."""
    if not allowed:
        return tuple(placeholders)
    return tuple(sorted((set(range(vocab_size)) - set(allowed)) | set(placeholders)))
