"""One optimizer step, an *update*: packs in, a better policy and its statistics out.

    for each micro-batch: forward -> loss (this pack's share of the batch) -> backward (FSDP2 reduces the gradients)
    then: global gradient norm -> clip -> AdamW

All ranks call `train_step` together, with equally many micro-batches. The loss is divided by counts of the whole batch,
so neither the number of micro-batches nor that of ranks changes the result.

A loss or a gradient that is not finite skips the update on all ranks alike (both are global): parameters, optimizer
state and policy stay as they were, an error is logged and `StepStats.skipped` is set. Nothing is replaced by zero. The
loss counts too because autograd can lose a NaN: the gradient of `clamp` at NaN is 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import structlog
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from learner.algorithms.losses import BatchTotals, LossTerms, policy_loss
from learner.batch.packing import PackedBatch
from learner.config.algorithm import AlgorithmConfig
from learner.model.logprobs import Forward, completion_logprobs
from learner.model.parallelize import compute_device

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one step did, over all ranks. Means are over completion tokens, with the policy before the update."""

    loss: float
    grad_norm: float
    """Before clipping."""
    skipped: bool
    """Loss or gradient was not finite and nothing was updated."""
    num_updates: int
    """Optimizer updates made."""
    num_skipped: int
    """Those that were not, for their loss or gradient."""
    entropy: float
    """Nats."""
    clip_fraction: float
    """Share of tokens that the clip took out of the gradient (with `cispo`: whose weight it bounded)."""
    masked_fraction: float
    """Share of tokens that `importance_mask` or `mask_truncated_completions` took out of the gradient."""
    ratio_mean: float
    """Learner probability / old policy's probability."""
    mismatch_kl: float
    """Estimate of KL(actor || learner)."""
    reference_kl: float
    parity_max_abs_diff: float
    """Largest |learner logprob - actor logprob| over tokens that the current version sampled; 0 if there are none."""
    parity_mean_abs_diff: float
    parity_tokens: int
    num_tokens: int
    """Completion tokens that were trained on."""
    num_sequences: int
    num_input_tokens: int
    """Tokens that went through the model."""
    learning_rate: float


# Fields of `StepStats`: means over tokens, and all that micro-batches and ranks add up.
_PER_TOKEN = ("entropy", "clip_fraction", "masked_fraction", "ratio_mean", "mismatch_kl", "reference_kl")
_SUMS = ("loss", *_PER_TOKEN, "parity_mean_abs_diff", "parity_tokens", "num_input_tokens")


def merge_stats(updates: Sequence[Sequence[StepStats]]) -> StepStats:
    """The updates of one batch as one: sums of counts, extremes of extremes, means weighted by tokens.

    Args:
        updates: for each mini-batch those of its epochs. Its completions are counted once, for all of them.
    """
    every = [update for of_mini_batch in updates for update in of_mini_batch]
    tokens = sum(stats.num_tokens for stats in every)
    parity_tokens = sum(stats.parity_tokens for stats in every)

    def mean(name: str) -> float:
        return float(sum(getattr(stats, name) * stats.num_tokens for stats in every)) / tokens

    return StepStats(
        **{name: mean(name) for name in ("loss", "grad_norm", *_PER_TOKEN)},
        skipped=all(stats.skipped for stats in every),
        num_updates=sum(stats.num_updates for stats in every),
        num_skipped=sum(stats.num_skipped for stats in every),
        parity_max_abs_diff=float(np.max([stats.parity_max_abs_diff for stats in every])),  # NaN stays NaN
        parity_mean_abs_diff=sum(stats.parity_mean_abs_diff * stats.parity_tokens for stats in every)
        / max(1, parity_tokens),
        parity_tokens=parity_tokens,
        num_tokens=sum(epochs[0].num_tokens for epochs in updates),
        num_sequences=sum(epochs[0].num_sequences for epochs in updates),
        num_input_tokens=sum(stats.num_input_tokens for stats in every),
        learning_rate=every[-1].learning_rate,
    )


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[PackedBatch],
    algorithm: AlgorithmConfig,
    *,
    policy_version: int | None,
    forward: Forward = completion_logprobs,
    num_copies: int = 1,
    max_grad_norm: float = 1.0,
    learning_rate: float | None = None,
) -> StepStats:
    """Accumulate the gradient of a batch and update the policy.

    Args:
        model: in train mode; if the default process group is up, sharded over all its ranks.
        optimizer: over the model's parameters.
        micro_batches: this rank's, as `pack_batch` makes them.
        algorithm: coefficients of the loss.
        policy_version: tokens of this version count for parity, by `PackedBatch.old_logprobs` where packs have them
            and else by the parameters now, which must be of this version. None: no token is compared.
        forward: `completion_logprobs` with the settings of the sampling.
        num_copies: ranks that have the same micro-batches and share each of them, as `forward`'s sequence group does.
        max_grad_norm: gradients are scaled down to it.
        learning_rate: of this step; None leaves the optimizer's.

    Raises:
        ValueError: no rank has a token to train on.
    """
    device = compute_device(model)
    meter = _Meter(policy_version, device)
    totals = _totals(micro_batches, device, num_copies)
    for pack in (batch.to(device) for batch in micro_batches):
        logprobs, entropy = forward(model, pack)
        terms = policy_loss(
            logprobs,
            entropy,
            pack.actor_logprobs,
            pack.advantages,
            pack.sequence_ids,
            totals,
            algorithm,
            reference_logprobs=pack.reference_logprobs,
            old_logprobs=pack.old_logprobs,
            truncated=pack.truncated,
        )
        # FSDP2 averages gradients over the ranks; the loss wants their sum, with each sample once.
        (terms.loss * (_num_ranks() / num_copies)).backward()
        meter.add(pack, terms, logprobs.detach(), entropy.detach())
    grad_norm = clip_gradients(model, max_grad_norm)
    meter.reduce(num_copies)
    skipped = not (math.isfinite(grad_norm) and math.isfinite(meter.loss))
    if skipped:
        log.error(
            "loss or gradient is not finite: step skipped",
            loss=meter.loss,
            grad_norm=float(grad_norm),
            policy_version=policy_version,
        )
    else:
        _update(optimizer, learning_rate)
    optimizer.zero_grad(set_to_none=True)
    return meter.stats(float(grad_norm), skipped, optimizer.param_groups[0]["lr"], totals)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most `max_norm`; returns the norm before, equal on all ranks."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # each rank has the norm of its shards only
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _update(optimizer: torch.optim.Optimizer, learning_rate: float | None) -> None:
    if learning_rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    optimizer.step()


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _totals(micro_batches: Sequence[PackedBatch], device: torch.device, num_copies: int) -> BatchTotals:
    counts = torch.tensor(
        [sum(len(pack.targets) for pack in micro_batches), sum(pack.num_sequences for pack in micro_batches)],
        dtype=torch.int64,
        device=device,
    )
    if dist.is_initialized():
        dist.all_reduce(counts)
    totals = BatchTotals(*(counts // num_copies).tolist())
    if totals.num_tokens == 0:
        raise ValueError("no micro-batch of any rank has a completion to train on")
    return totals


class _Meter:
    """Sums over micro-batches and ranks."""

    def __init__(self, policy_version: int | None, device: torch.device) -> None:
        self._policy_version = policy_version
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._parity_max = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, pack: PackedBatch, terms: LossTerms, logprobs: Tensor, entropy: Tensor) -> None:
        """Count one micro-batch."""
        current = torch.zeros_like(pack.versions, dtype=torch.bool)
        if self._policy_version is not None:
            current = pack.versions == self._policy_version
        of_version = pack.old_logprobs if pack.old_logprobs is not None else logprobs
        difference = (of_version - pack.actor_logprobs).abs().double()
        difference = torch.where(current, difference, 0.0)  # a product would keep a NaN of other tokens
        values = {
            "loss": terms.loss.detach(),
            "entropy": entropy.sum(),
            "clip_fraction": terms.clipped.sum(),
            "masked_fraction": terms.masked.sum(),
            "ratio_mean": terms.ratio.sum(),
            "mismatch_kl": terms.mismatch_kl.sum(),
            "reference_kl": terms.reference_kl.sum(),
            "parity_mean_abs_diff": difference.sum(),
            "parity_tokens": current.sum(),
            "num_input_tokens": torch.full((), len(pack.input_ids), device=self._sums.device),
        }
        self._sums += torch.stack([values[name].double() for name in _SUMS])
        if len(difference):
            self._parity_max = torch.maximum(self._parity_max, difference.max())

    def reduce(self, num_copies: int) -> None:
        """Over the ranks, of which `num_copies` each have counted the same micro-batches; once all are counted."""
        if dist.is_initialized():
            dist.all_reduce(self._sums)
            self._sums /= num_copies
            dist.all_reduce(self._parity_max, op=dist.ReduceOp.MAX)

    @property
    def loss(self) -> float:
        """Of the batch."""
        loss: float = self._sums[_SUMS.index("loss")].item()
        return loss

    def stats(self, grad_norm: float, skipped: bool, learning_rate: float, totals: BatchTotals) -> StepStats:
        """The whole step, once reduced."""
        sums = dict(zip(_SUMS, self._sums.tolist(), strict=True))
        # Gloo's maximum loses a NaN of any rank but the first; a sum does not.
        parity_max = math.nan if math.isnan(sums["parity_mean_abs_diff"]) else float(self._parity_max)
        return StepStats(
            **{name: sums[name] / totals.num_tokens for name in _PER_TOKEN},
            loss=sums["loss"],
            grad_norm=grad_norm,
            skipped=skipped,
            num_updates=int(not skipped),
            num_skipped=int(skipped),
            parity_max_abs_diff=parity_max,
            parity_mean_abs_diff=sums["parity_mean_abs_diff"] / max(1.0, sums["parity_tokens"]),
            parity_tokens=int(sums["parity_tokens"]),
            num_tokens=totals.num_tokens,
            num_sequences=totals.num_sequences,
            num_input_tokens=int(sums["num_input_tokens"]),
            learning_rate=learning_rate,
        )
