"""Sequence parallelism from outside, DeepSpeed-Ulysses (arXiv 2309.14509): the ranks of a group share one long pack.

T tokens, s ranks in a group, t = T / s rounded up. All ranks of a group get the same packs:

    embeddings, vision tower    [1, T, h]         all of it on every rank
         split                  [1, t, h]         rank i keeps tokens i * t ... (i + 1) * t, zeros behind the last
      layers of the text model  [1, t, h]         norms, projections, MLPs: each token on one rank
       | q, k, v                [1, H, t, d]
       | to_heads: all-to-all   [1, H / s, T, d]  packed attention: each head on one rank, over whole rows
       | to_tokens: all-to-all  [1, t, H, d]
         gather                 [1, T, h]         the last hidden states, on every rank
    output layer                [N / s, V]        the rank's share of the N predictions
         gather                 [N]               logprobs and entropies, and so the loss, on every rank

So the activations of the text model and its logits fall by s; what is left whole are the embeddings, the last hidden
states, the masks of attention and the vision tower.

Backward, every collective is the transpose of itself (all-to-all: all-to-all; gather: sum of all gradients, own part),
which makes the gradients on the ranks of a group add up to that of the sum of their s equal losses, in the
vision tower too, where each rank sees the gradient of its own tokens only. `train_step` divides by s.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from common.config import ConfigError

_SETTING = "trainer.sequence_parallel_size"
# What a text model may take; anything else may be laid out along the sequence, too.
_ARGUMENTS = frozenset(
    {
        "attention_mask",
        "cache_position",
        "deepstack_visual_embeds",
        "input_ids",
        "inputs_embeds",
        "kwargs",
        "past_key_values",
        "position_ids",
        "use_cache",
        "visual_pos_masks",
    }
)
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Their frequencies depend on the largest position in the sequence.
_GLOBAL_ROPES = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, slots=True, eq=False)
class SequenceGroup:
    """The ranks that share one sequence, neighbours in rank order, as one of them sees it."""

    size: int
    rank: int
    """Of this process in the group."""
    process_group: dist.ProcessGroup

    def share(self, states: Tensor, dim: int) -> Tensor:
        """This rank's part along `dim`, ceil(length / size) long; zeros where the sequence has ended."""
        length = -(-states.shape[dim] // self.size)
        start = min(self.rank * length, states.shape[dim])
        mine = states.narrow(dim, start, min(length, states.shape[dim] - start))
        return _pad(mine, dim, length)

    def gather(self, states: Tensor, length: int) -> Tensor:
        """The inverse of `share` along dimension 0: `[ceil(length / size), ...]` to `[length, ...]`, on every rank."""
        gathered: Tensor = _Gather.apply(states.contiguous(), self)  # type: ignore[no-untyped-call]
        return gathered[:length]


@dataclass(frozen=True, slots=True, eq=False)
class SplitSequence:
    """A sequence of `length` tokens that is split over `group`; the text model hands it to its attention."""

    group: SequenceGroup
    length: int

    def to_heads(self, states: Tensor) -> Tensor:
        """Some tokens of all heads to all tokens of some heads: `[1, H, t, d]` to `[1, H / s, T, d]`.

        Where s does not divide H (key and value heads), heads are repeated until it does; query heads still find
        their own, since s divides their number.
        """
        size = self.group.size
        repeats = math.lcm(states.shape[1], size) // states.shape[1]
        if repeats > 1:
            states = states.repeat_interleave(repeats, dim=1)
        parts = states[0].unflatten(0, (size, -1)).transpose(1, 2)
        tokens = self._exchange(parts).flatten(0, 1)[: self.length]
        return tokens.transpose(0, 1).unsqueeze(0)

    def to_tokens(self, states: Tensor) -> Tensor:
        """Back: `[1, T, H / s, d]` to `[1, t, H, d]`."""
        size = self.group.size
        tokens = _pad(states[0], 0, -(-self.length // size) * size)
        parts = tokens.unflatten(0, (size, len(tokens) // size))
        return self._exchange(parts).transpose(0, 1).flatten(1, 2).unsqueeze(0)

    def _exchange(self, parts: Tensor) -> Tensor:
        """`[s, ...]`: part i to rank i; back comes what each rank had for this one."""
        return cast("Tensor", _AllToAll.apply(parts.contiguous(), self.group))  # type: ignore[no-untyped-call]


def make_sequence_group(device: str, num_ranks: int, size: int) -> SequenceGroup | None:
    """This rank's group; a collective of all ranks. None for size 1.

    Raises:
        ConfigError: `size` does not divide the number of ranks.
    """
    if size == 1:
        return None
    if num_ranks % size:
        raise ConfigError(f"{_SETTING} is {size}, which does not divide the {num_ranks} ranks")
    mesh = init_device_mesh(device, (num_ranks // size, size), mesh_dim_names=("batch", "sequence"))["sequence"]
    return SequenceGroup(size, mesh.get_local_rank(), mesh.get_group())


def split_sequences(model: nn.Module, text_model: nn.Module, group: SequenceGroup | None) -> None:
    """Let the ranks of `group` share every sequence that goes through the text model of `model`, in place.

    Without a group nothing changes. Call it before the model is sharded.

    Raises:
        ConfigError: the model mixes tokens in a way that is not known here.
    """
    if group is None:
        return
    _check(model, text_model, group.size)

    def split(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds = kwargs["inputs_embeds"]
        parts = {"inputs_embeds": group.share(embeds, 1), "position_ids": group.share(kwargs["position_ids"], -1)}
        if kwargs.get("visual_pos_masks") is not None:
            parts |= _share_deepstack(group, kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"])
        return args, {**kwargs, **parts, "split_sequence": SplitSequence(group, embeds.shape[1])}

    def gather(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        length = kwargs["split_sequence"].length
        output.last_hidden_state = group.gather(output.last_hidden_state[0], length).unsqueeze(0)
        return output

    text_model.register_forward_pre_hook(split, with_kwargs=True)
    text_model.register_forward_hook(gather, with_kwargs=True)


def _check(model: nn.Module, text_model: nn.Module, size: int) -> None:
    name = type(model).__name__
    config: Any = model.config
    config = config.get_text_config()
    if config.num_attention_heads % size:
        raise ConfigError(
            f"{_SETTING} is {size}, which does not divide the {config.num_attention_heads} attention heads of {name}"
        )
    ropes = getattr(config, "rope_parameters", None) or {}
    rope_types = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    unknown = [
        *sorted(inspect.signature(text_model.forward).parameters.keys() - _ARGUMENTS),
        *sorted({*(getattr(config, "layer_types", None) or ())} - _LAYER_TYPES),
        *(f"{rope} rotary embeddings" for rope in sorted(_GLOBAL_ROPES & rope_types)),
    ]
    if unknown:
        raise ConfigError(f"{_SETTING} does not fit {name}: its text model has {unknown[0]}; set it to 1")


def _share_deepstack(group: SequenceGroup, mask: Tensor, embeds: list[Tensor]) -> dict[str, Any]:
    """What Qwen3-VL adds to the hidden states of image tokens: `mask` `[1, T]`, and for some layers `[tokens, h]`."""
    mine = group.share(mask, 1)
    start = int(mask[:, : group.rank * mine.shape[1]].sum())
    return {
        "visual_pos_masks": mine,
        "deepstack_visual_embeds": [states[start : start + int(mine.sum())] for states in embeds],
    }


def _pad(states: Tensor, dim: int, length: int) -> Tensor:
    missing = length - states.shape[dim]
    if not missing:
        return states
    after = [0] * (2 * (states.ndim - 1 - dim % states.ndim))
    return nn.functional.pad(states, [*after, 0, missing])


class _AllToAll(torch.autograd.Function):
    """`[s, ...]`: part i of rank j becomes part j of rank i. Its own inverse and its own transpose."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group.process_group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad.contiguous(), ctx.group), None  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """`[t, ...]` of each rank to `[s * t, ...]`; the gradient is the sum of those of all ranks."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        gathered = states.new_empty(group.size * len(states), *states.shape[1:])
        dist.all_gather(list(gathered.chunk(group.size)), states, group=group.process_group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = list(grad.contiguous().chunk(ctx.group.size))
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=ctx.group.process_group)
        return mine, None
