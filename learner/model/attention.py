"""Attention of the text model over a packed batch, as a function that `transformers` calls by name.

The model runs on one long sequence [1, T]. Only here do rows matter: rows of similar length are laid side by side as
[rows, longest], and go through `scaled_dot_product_attention` with a boolean mask from the branches (see
`learner.batch.packing`); rows of a single completion need none, they are causal. Where every row has the same length
that is a view, otherwise a gather. On a GPU, in 16 bits, a pack goes through flash attention instead, in one call
(`learner.model.varlen_attention`). The vision tower keeps its own attention, and a forward without a layout is plain
causal attention.

A query sees a key of its row that comes no later and is of the prompt or of the query's own branch. Two things that
some models add: layers with a sliding window see only the last so many tokens (counted along prompt and branch), and
the tokens of one image see each other in both directions, as far as the window reaches.

Imports transformers only when used: its models import torchvision, which may have to be repaired first
(`common.torchvision_ops`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from learner.model.sequence_parallel import SplitSequence
from learner.model.varlen_attention import VarlenLayout, attend, fits, varlen_layout

NAME = "outrider_packed"
"""What `config._attn_implementation` of the text model says."""

# What the attention of some models has beside; unknown to `packed_attention`, so refused.
_UNKNOWN = ("softcap", "s_aux", "head_mask", "position_bias")

# Rows share a block while its padding adds no more pairs of tokens than this: what another call costs, and more of them
# on a GPU, which computes many pairs in the time of a call.
_CALL_PAIRS_CPU = 2**14
_CALL_PAIRS = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows that go through attention side by side, each padded on the right to `length` tokens."""

    num_rows: int
    length: int
    branches: Tensor
    """int64 [rows, length], -1 in padding."""
    orders: Tensor
    """int64 [rows, length]: place of the token in its own sequence, prompt and branch."""
    spans: Tensor
    """int64 [rows, length]: number of the image that sees itself in both directions, 0 elsewhere."""
    causal: bool
    """Every token sees all of its row that come no later; padding is behind them all."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor | None:
        """bool [rows, 1, length, length]: query may see key; None where causal attention is just that.

        A padding place sees itself only, so nothing is NaN.
        """
        if self.causal and (window is None or window >= self.length):
            return None
        if window not in self._masks:
            self._masks[window] = _mask(self.branches, self.orders, self.spans, window)
        return self._masks[window]


class PackedLayout:
    """How a pack of T tokens lies in blocks of M places together; made once for a forward, used by every layer.

    No dataclass: FSDP2 copies those for each unit, to cast what is in them, and each unit would make its own masks.
    """

    __slots__ = ("blocks", "gather", "scatter", "varlen")

    def __init__(
        self, blocks: tuple[Block, ...], gather: Tensor | None, scatter: Tensor | None, varlen: VarlenLayout | None
    ) -> None:
        """Blocks, and how they are filled.

        Args:
            blocks: all rows.
            gather: int64 `[M]`, the token in each place, 0 in padding; None if places and tokens are the same.
            scatter: int64 `[T]`, the place of each token; None likewise.
            varlen: the same for flash attention; None where images see themselves in both directions.
        """
        self.blocks = blocks
        self.gather = gather
        self.scatter = scatter
        self.varlen = varlen


def register() -> str:
    """Make the function known to transformers; returns the name that it is known by. Repeated calls are harmless.

    No mask function goes with it: for a name without one, transformers builds no mask at all.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    return NAME


def packed_layout(row_lengths: Sequence[int], branch_ids: Tensor, seen_whole: Tensor | None = None) -> PackedLayout:
    """Group the rows of a pack into blocks.

    Args:
        row_lengths: tokens of each row, in the order of the pack; sums to T.
        branch_ids: int64 `[T]`, on the device where attention will run.
        seen_whole: bool `[T]`, the tokens of images that see themselves in both directions; an image is a run of them.
    """
    if sum(row_lengths) != len(branch_ids):
        raise ValueError(f"rows hold {sum(row_lengths)} tokens, the pack {len(branch_ids)}")
    device = branch_ids.device
    branches_of_rows = branch_ids.cpu().split(list(row_lengths))
    orders = _orders(branches_of_rows).to(device)
    spans = torch.zeros_like(branch_ids) if seen_whole is None else _number_runs(seen_whole)
    starts = torch.tensor([0, *row_lengths]).cumsum(0)
    is_causal = [seen_whole is None and bool(branches.max() <= 1) for branches in branches_of_rows]
    max_padding = _CALL_PAIRS_CPU if device.type == "cpu" else _CALL_PAIRS
    groups = _similar(row_lengths, is_causal, max_padding)
    gathers: list[Tensor] = []
    for rows in groups:
        steps = torch.arange(row_lengths[rows[0]])
        lengths = torch.tensor([row_lengths[row] for row in rows])
        gathers.append(torch.where(steps < lengths[:, None], starts[rows][:, None] + steps, -1))
    blocks = tuple(
        _block(gather.to(device), branch_ids, orders, spans, is_causal[rows[0]])
        for rows, gather in zip(groups, gathers, strict=True)
    )
    varlen = varlen_layout(branches_of_rows, device) if seen_whole is None else None
    joined = torch.cat([gather.flatten() for gather in gathers])
    if torch.equal(joined, torch.arange(len(branch_ids))):
        return PackedLayout(blocks, None, None, varlen)
    places = torch.nonzero(joined >= 0).squeeze(1)
    scatter = torch.empty_like(places).index_copy_(0, joined[places], places)
    return PackedLayout(blocks, joined.clamp_(min=0).to(device), scatter.to(device), varlen)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # masks and blocks are another for each pack
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed_layout: PackedLayout | None = None,
    split_sequence: SplitSequence | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls: `[1, heads, T, d]` in, (`[1, T, heads, d]`, None) out.

    Of a sequence that ranks share (`split_sequence`), T are the tokens of this rank; the layout is of all tokens.

    Raises:
        ValueError: the model wants something of its attention that is not done here.
    """
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise ValueError(f"the attention of {type(module).__name__} has {name}, which packed attention does not do")
    if split_sequence is not None:
        query, key, value = (split_sequence.to_heads(states) for states in (query, key, value))
    if packed_layout is None:
        assert split_sequence is None, "only packs are split"
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    # One line for each token: [T, heads, d].
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if packed_layout.varlen is not None and fits(q) and not dropout:
        joined = attend(q, k, v, packed_layout.varlen, scaling=scaling, window=sliding_window)
    else:
        joined = _attend_blocks(q, k, v, packed_layout, scaling=scaling, window=sliding_window, dropout=dropout)
    output = joined.unsqueeze(0)
    return (output if split_sequence is None else split_sequence.to_tokens(output)), None


def _attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, *, scaling: float | None, window: int | None, dropout: float
) -> Tensor:
    """`[T, heads, d]`, block by block."""
    gather, scatter = layout.gather, layout.scatter
    if gather is not None and scatter is not None:
        q, k, v = (_pad(states.contiguous(), gather, scatter) for states in (q, k, v))
    sizes = [block.num_rows * block.length for block in layout.blocks]
    outputs = []
    for block, *parts in zip(layout.blocks, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        queries, keys, values = (
            part.reshape(block.num_rows, block.length, *part.shape[1:]).transpose(1, 2) for part in parts
        )
        groups = queries.shape[1] // keys.shape[1]
        if groups > 1:
            keys, values = (states.repeat_interleave(groups, dim=1) for states in (keys, values))
        mask = block.mask(window)
        attended = nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined if scatter is None else _unpad(joined, scatter)


def _pad(states: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
    padded: Tensor = _Pad.apply(states, gather, scatter)  # type: ignore[no-untyped-call]
    return padded


def _unpad(states: Tensor, scatter: Tensor) -> Tensor:
    unpadded: Tensor = _Unpad.apply(states, scatter)  # type: ignore[no-untyped-call]
    return unpadded


def _similar(row_lengths: Sequence[int], is_causal: Sequence[bool], max_padding: int) -> list[list[int]]:
    """Row numbers in blocks, longest first, those that need a mask in other blocks than those that need none.

    Rows of equal length keep their order. The padding of a block adds at most `max_padding` pairs of tokens.
    """
    blocks: list[list[int]] = []
    padding = 0
    for row in sorted(range(len(row_lengths)), key=lambda row: (is_causal[row], -row_lengths[row])):
        if blocks and is_causal[row] == is_causal[blocks[-1][0]]:
            padding += row_lengths[blocks[-1][0]] ** 2 - row_lengths[row] ** 2
            if padding <= max_padding:
                blocks[-1].append(row)
                continue
        blocks.append([row])
        padding = 0
    return blocks


def _orders(branches_of_rows: Sequence[Tensor]) -> Tensor:
    """int64 `[T]`: place of each token in its own sequence: in the prompt, or behind it in its branch."""
    orders = []
    for branches in branches_of_rows:
        steps = torch.arange(len(branches))
        lengths = torch.bincount(branches)
        firsts = lengths.cumsum(0) - lengths  # branches are contiguous and ascending
        orders.append(torch.where(branches > 0, steps - firsts[branches] + lengths[0], steps))
    return torch.cat(orders)


def _number_runs(flags: Tensor) -> Tensor:
    """int64 `[T]`: 1 in the first run of True, 2 in the second, and so on; 0 elsewhere."""
    starts = flags & ~torch.nn.functional.pad(flags[:-1], (1, 0))
    return starts.long().cumsum(0) * flags


def _block(gather: Tensor, branch_ids: Tensor, orders: Tensor, spans: Tensor, causal: bool) -> Block:
    """The tokens `gather` `[rows, L]`, -1 in padding."""
    places = gather.clamp(min=0)
    branches = torch.where(gather >= 0, branch_ids[places], -1)
    spans = torch.where(gather >= 0, spans[places], 0)
    return Block(len(gather), gather.shape[1], branches, orders[places], spans, causal)


def _mask(branches: Tensor, orders: Tensor, spans: Tensor, window: int | None) -> Tensor:
    steps = torch.arange(branches.shape[1], device=branches.device)
    query, key = branches[:, :, None], branches[:, None, :]
    visible = (steps[:, None] >= steps) & ((key == 0) | (key == query))
    visible |= (spans[:, :, None] == spans[:, None, :]) & (spans[:, :, None] > 0)
    if window is not None:
        visible &= orders[:, :, None] - orders[:, None, :] < window
    return (visible & (query >= 0) | (steps[:, None] == steps)).unsqueeze(1)


class _Pad(torch.autograd.Function):
    """Tokens to places. Every token has one place, so the gradient is a gather too: no atomics, deterministic."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        return states.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scatter,) = ctx.saved_tensors
        return grad.index_select(0, scatter), None, None


class _Unpad(torch.autograd.Function):
    """Places back to tokens; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        ctx.num_places = len(states)
        return states.index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scatter,) = ctx.saved_tensors
        padded = grad.new_zeros(ctx.num_places, *grad.shape[1:])
        return padded.index_copy_(0, scatter, grad), None
