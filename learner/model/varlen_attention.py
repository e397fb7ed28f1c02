"""Attention of a pack on a GPU: one call of torch's variable-length flash attention, without padding and without masks.

Every branch of a row is a sequence of queries whose keys are the prompt's and its own. The last query sees all of its
keys, the one before it all but the last, and so on, which is what flash attention calls causal for fewer queries than
keys:

    row        p p p a a b b b          queries   [p p p] [a a]        [b b b]
    branches   0 0 0 1 1 2 2 2          keys      [p p p] [p p p a a]  [p p p b b b]

Queries so stay where they are in the pack; keys and values of shared prompts are gathered once for each branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class VarlenLayout:
    """The branches of a pack of T tokens as B sequences of queries with K keys in all."""

    query_offsets: Tensor
    """int32 [B + 1], from 0 to T."""
    key_offsets: Tensor
    """int32 [B + 1], from 0 to K."""
    max_queries: int
    max_keys: int
    gather: Tensor | None
    """int64 [K]: the token of each key; None if keys and tokens are the same."""


def varlen_layout(branches_of_rows: Sequence[Tensor], device: torch.device) -> VarlenLayout:
    """From the branch ids of each row, on the CPU: ascending from 0, the prompt's."""
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    start = 0
    for branches in branches_of_rows:
        tokens = torch.arange(start, start + len(branches))
        start += len(branches)
        prompt, *completions = tokens.split(torch.bincount(branches).tolist())
        if len(completions) == 1:  # it goes on where its prompt ends
            prompt, completions = tokens, []
        queries += [prompt, *completions]
        keys += [prompt, *(torch.cat([prompt, completion]) for completion in completions)]
    gather = torch.cat(keys)
    return VarlenLayout(
        query_offsets=_offsets(queries, device),
        key_offsets=_offsets(keys, device),
        max_queries=max(map(len, queries)),
        max_keys=max(map(len, keys)),
        gather=None if len(gather) == start else gather.to(device),
    )


def fits(query: Tensor) -> bool:
    """Whether flash attention takes `[..., d]` of this kind."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, *, scaling: float | None, window: int | None
) -> Tensor:
    """`[T, heads, d]` from `[T, heads, d]` and keys and values `[T, kv heads, d]`.

    Args:
        query: of all tokens.
        key: of all tokens.
        value: of all tokens.
        layout: of the pack.
        scaling: of the scores; None: 1 / sqrt(d).
        window: a token sees only so many, itself included; None: all.
    """
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if layout.gather is not None:
        key, value = (states.index_select(0, layout.gather) for states in (key, value))
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    attended = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        layout.query_offsets,
        layout.key_offsets,
        layout.max_queries,
        layout.max_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    assert isinstance(attended, Tensor)
    return attended


def _offsets(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([0, *map(len, parts)]).cumsum(0).to(device, torch.int32)
