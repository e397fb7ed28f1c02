"""Log-probabilities of the trained completion tokens of a pack under the current policy."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learner.batch.packing import PackedBatch
from learner.model.attention import packed_layout

# Float32 logits that exist at once, in elements; more are computed piece by piece and again in the backward pass.
_MAX_LOGIT_ELEMENTS = 2**26


def completion_logprobs(
    model: nn.Module, pack: PackedBatch, *, temperature: float = 1.0, suppressed_token_ids: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Run the policy over a pack.

    The output layer is applied only where a token is predicted. Everything after it is float32: the distribution that
    was sampled is `softmax(logits / temperature)` with `suppressed_token_ids` left out.

    Args:
        model: a vision-language model of transformers with `learner.model.attention` as the text model's attention.
        pack: on the model's device.
        temperature: of the sampling; 0 (greedy) counts as 1, as on the actor.
        suppressed_token_ids: ids that the actor could not sample (image placeholders).

    Returns:
        (logprobs float32 `[N]`, entropy float32 `[N]` in nats), both with gradient.
    """
    logits = model(**forward_inputs(pack), logits_to_keep=pack.predict_from).logits[0]
    return token_logprobs(logits, pack.targets, temperature or 1.0, suppressed_token_ids)


def forward_inputs(pack: PackedBatch) -> dict[str, Any]:
    """Keyword arguments of the model's forward for a pack."""
    positions = pack.position_ids
    return {
        "input_ids": pack.input_ids.unsqueeze(0),
        "position_ids": positions.unsqueeze(1) if len(positions) > 1 else positions,
        "packed_layout": packed_layout(pack.row_lengths.tolist(), pack.branch_ids),
        "use_cache": False,
        **pack.media,
    }


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, suppressed_token_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(logprob of each target `[N]`, entropy of each distribution `[N]`) from logits `[N, V]`, in float32."""
    suppressed = torch.tensor(suppressed_token_ids, dtype=torch.int64, device=logits.device)
    rows = max(1, _MAX_LOGIT_ELEMENTS // logits.shape[1])
    if len(logits) <= rows:
        return _token_logprobs(logits, targets, temperature, suppressed)
    pieces = [
        checkpoint(_token_logprobs, *piece, temperature, suppressed, use_reentrant=False)
        for piece in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])


def _token_logprobs(logits: Tensor, targets: Tensor, temperature: float, suppressed: Tensor) -> tuple[Tensor, Tensor]:
    scaled = logits.float() / temperature
    if len(suppressed):
        # Far below every logit but finite: p is exactly 0, and p * log(p) in the entropy stays 0 instead of NaN.
        scaled = scaled.index_fill(1, suppressed, torch.finfo(torch.float32).min / 2)
    all_logprobs = torch.log_softmax(scaled, dim=-1)
    logprobs = all_logprobs.gather(1, targets[:, None]).squeeze(1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return logprobs, entropy
