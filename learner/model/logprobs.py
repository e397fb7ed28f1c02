"""Log-probabilities of the trained completion tokens of a pack under the current policy."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.media.placeholders import image_token_id
from learner.batch.packing import PackedBatch
from learner.model.attention import packed_layout
from learner.model.fused_logprobs import SUPPRESSED_LOGIT, fused_logprobs
from learner.model.sequence_parallel import SequenceGroup
from learner.model.supported import logit_settings

# Float32 logits that exist at once, in elements; more are computed piece by piece and again in the backward pass.
_MAX_LOGIT_ELEMENTS = 2**26

# Families whose text model lets the tokens of an image see each other in both directions.
_IMAGES_SEEN_WHOLE = frozenset({"gemma3"})

Forward = Callable[[Any, PackedBatch], tuple[Tensor, Tensor]]
"""`completion_logprobs` of a model and a pack, its settings bound."""


def completion_logprobs(
    model: Any,
    pack: PackedBatch,
    *,
    temperature: float = 1.0,
    suppressed_token_ids: Sequence[int] = (),
    fused: bool = False,
    sequence_group: SequenceGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the policy over a pack.

    The output layer is applied only where a token is predicted. Everything after it is float32: the distribution that
    was sampled is `softmax(logits / temperature)` with `suppressed_token_ids` left out.

    Args:
        model: a vision-language model of transformers with `learner.model.attention` as the text model's attention.
        pack: on the model's device.
        temperature: of the sampling; 0 (greedy) counts as 1, as on the actor.
        suppressed_token_ids: ids that the actor could not sample (image placeholders).
        fused: apply the output layer slice by slice, and again in the backward pass, so that `[N, V]` logits never
            exist (`learner.model.fused_logprobs`). `check_fused` says whether the model allows it.
        sequence_group: the ranks that share the pack (`split_sequences`); each applies the output layer to its part.

    Returns:
        (logprobs float32 `[N]`, entropy float32 `[N]` in nats), both with gradient.
    """
    predict_from, targets = pack.predict_from, pack.targets
    if sequence_group is not None:
        predict_from, targets = (sequence_group.share(indices, 0) for indices in (predict_from, targets))
    inputs = {**forward_inputs(pack, model.config), "logits_to_keep": predict_from}
    if fused:
        with _without_output_layer(model) as output_layer:
            hidden = _kept(model, model(**inputs).logits[0], predict_from)
        result = fused_logprobs(output_layer, hidden, targets, temperature or 1.0, suppressed_token_ids)
    else:
        logits = _kept(model, model(**inputs).logits[0], predict_from)
        result = token_logprobs(logits, targets, temperature or 1.0, suppressed_token_ids)
    if sequence_group is not None:
        logprobs, entropy = sequence_group.gather(torch.stack(result, dim=1), len(pack.targets)).unbind(1)
        return logprobs, entropy
    return result


def _kept(model: Any, rows: Tensor, indices: Tensor) -> Tensor:
    """Those of `logits_to_keep`, also from a model that does not know the argument and gives them all.

    By its name: there may be as many tokens as targets.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return rows[indices]
    if len(rows) != len(indices):
        raise RuntimeError(f"{type(model).__name__} gave {len(rows)} rows of logits for {len(indices)} logits_to_keep")
    return rows


def check_fused(model: nn.Module) -> None:
    """Raise ValueError for a model whose logits are more than its output layer applied to the last hidden states."""
    config: Any = model.config
    settings = [*logit_settings(config)]
    if settings or not isinstance(getattr(model, "lm_head", None), nn.Linear):
        reason = f"it has {settings[0]}" if settings else "it has no linear lm_head"
        raise ValueError(f"use_fused_kernels does not fit {type(model).__name__}: {reason}; set it to false")


@contextlib.contextmanager
def _without_output_layer(model: Any) -> Iterator[nn.Module]:
    """The model's forward returns hidden states in place of logits.

    Its output layer is given out; under FSDP2 it belongs to the root, whose parameters stay whole until the backward
    pass has used them.
    """
    output_layer = model.lm_head
    model.lm_head = nn.Identity()
    try:
        yield output_layer
    finally:
        model.lm_head = output_layer


def forward_inputs(pack: PackedBatch, config: Any) -> dict[str, Any]:
    """Keyword arguments of the forward of the model with this Hugging Face `config`, for a pack."""
    positions = pack.position_ids
    seen_whole = None
    if config.model_type in _IMAGES_SEEN_WHOLE:
        seen_whole = torch.eq(pack.input_ids, image_token_id(config) or 0)
    return {
        "input_ids": pack.input_ids.unsqueeze(0),
        "position_ids": positions.unsqueeze(1) if len(positions) > 1 else positions,
        "packed_layout": packed_layout(pack.row_lengths.tolist(), pack.branch_ids, seen_whole),
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
        scaled = scaled.index_fill(1, suppressed, SUPPRESSED_LOGIT)
    all_logprobs = torch.log_softmax(scaled, dim=-1)
    logprobs = all_logprobs.gather(1, targets[:, None]).squeeze(1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return logprobs, entropy
