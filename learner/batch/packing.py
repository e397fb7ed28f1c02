"""Finished groups to packed micro-batches: sequences end to end, no pad token through the model.

A *row* is one prompt followed by completions of it. Every token has a branch: 0 for the prompt, k >= 1 for the k-th
completion of the row. A token attends to those of its own row that come no later and are of branch 0 or of its own
branch. So a group's prompt, image included, goes through the model once for all its completions:

    ids       p0 p1 p2 | a0 a1 | b0 b1 b2 | c0        (prompt p, completions a, b, c without their last token)
    branch     0  0  0 |  1  1 |  2  2  2 |  3
    position   0  1  2 |  3  4 |  3  4  5 |  3

The last token of a completion predicts nothing and is left out. Without `share_prefix` every completion is a row with
a copy of the prompt: the reference, equal up to rounding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common.types import Completion, FinishReason, FloatArray
from learner.batch.balance import ModelCost, balance
from learner.batch.multimodal import extract_multi_modal_inputs
from learner.types import Group, ProcessedPrompt


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: T tokens in R rows, N trained completion tokens of S completions. CPU tensors until moved."""

    input_ids: Tensor
    """int64 [T]."""
    position_ids: Tensor
    """int64 [3, T], or [1, T] for a model without M-RoPE."""
    branch_ids: Tensor
    """int64 [T]; 0 is the prompt."""
    row_lengths: Tensor
    """int64 [R], sums to T."""
    predict_from: Tensor
    """int64 [N]: index into the pack of the token whose hidden state predicts target n."""
    targets: Tensor
    """int64 [N]."""
    sequence_ids: Tensor
    """int64 [N]: completion of target n, ascending from 0."""
    actor_logprobs: Tensor
    """float32 [N], of the distribution that was sampled."""
    versions: Tensor
    """int64 [N]: policy version that sampled target n."""
    advantages: Tensor
    """float32 [S]."""
    truncated: Tensor
    """bool [S]: cut off for its length."""
    media: dict[str, Tensor] = field(default_factory=dict)
    """The model's media inputs, in the order of the rows."""
    reference_logprobs: Tensor | None = None
    """float32 [N] under the reference policy, where a KL term needs them."""
    old_logprobs: Tensor | None = None
    """float32 [N] under the learner's policy before the batch, where the loss compares with them."""

    @property
    def num_sequences(self) -> int:
        """Completions in the pack."""
        return len(self.advantages)

    def to(self, device: torch.device) -> "PackedBatch":
        """The same pack on `device`."""
        moved = {name: value.to(device) for name, value in self.tensors().items()}
        media = {name: value.to(device) for name, value in self.media.items()}
        return PackedBatch(**moved, media=media)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor but the media, by field name; absent ones left out."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "media"}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and those of its completions that share it in one pack."""

    prompt: ProcessedPrompt
    completions: tuple[Completion, ...] = ()
    advantages: tuple[float, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.prompt.input_ids) + sum(len(completion.token_ids) - 1 for completion in self.completions)


def pack_batch(
    groups: Sequence[Group],
    advantages: Sequence[FloatArray],
    *,
    num_ranks: int = 1,
    max_tokens: int = 8192,
    share_prefix: bool = True,
    filler: ProcessedPrompt | None = None,
    cost: ModelCost = ModelCost(),  # noqa: B008 - immutable
) -> list[list[PackedBatch]]:
    """Pack one training batch for every rank.

    Args:
        groups: the batch.
        advantages: for each group, float32 `[n]` in the order of its completions.
        num_ranks: ranks that train.
        max_tokens: tokens of a micro-batch; a single completion with its prompt may exceed it, then it is alone.
        share_prefix: one copy of the prompt for all completions of a row. A group still gets another row where a
            copy of the prompt costs less than the attention between completions that the mask throws away.
        filler: a prompt with the smallest image of the model (`PromptProcessor.filler`). It is added, untrained, to
            each pack that has no media, so that the vision tower runs (with zero gradient) on every rank: under FSDP
            all ranks must take part in its collectives. `None` for a text model.
        cost: of the model's parts: ranks and micro-batches get equal shares of it.

    Returns:
        `packs[rank][i]`; every rank has the same number of micro-batches.

    Raises:
        ValueError: nothing to pack, an empty completion, or advantages that do not fit their group.
    """
    rows = [
        row
        for group, values in zip(groups, advantages, strict=True)
        for row in _rows(group, values, share_prefix, max_tokens, cost)
    ]
    if not rows:
        raise ValueError("a training batch needs at least one group")
    costs = [cost.text(row.num_tokens) + cost.images(row.prompt.media) for row in rows]
    assignment = balance([row.num_tokens for row in rows], costs, num_ranks, max_tokens)
    empty = filler if filler is not None else _blank(rows[0].prompt)
    return [[_pack_or_fill([rows[i] for i in bin_], filler, empty) for bin_ in rank] for rank in assignment]


def pack(rows: Sequence[Row]) -> PackedBatch:
    """Lay rows end to end. Raises ValueError for version spans that do not cover their completion."""
    input_ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    branches: list[np.ndarray] = []
    predict_from: list[np.ndarray] = []
    offset = 0
    completions = [completion for row in rows for completion in row.completions]
    for row in rows:
        prompt = row.prompt
        num_prompt = len(prompt.input_ids)
        last_of_prompt = offset + num_prompt - 1
        input_ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        branches.append(np.zeros(num_prompt, np.int64))
        offset += num_prompt
        for branch, completion in enumerate(row.completions, start=1):
            inputs = completion.token_ids[:-1]
            input_ids.append(inputs)
            steps = prompt.next_position + np.arange(len(inputs))
            positions.append(np.broadcast_to(steps, (len(prompt.position_ids), len(inputs))))
            branches.append(np.full(len(inputs), branch, np.int64))
            predict_from.append(np.concatenate([[last_of_prompt], offset + np.arange(len(inputs))]))
            offset += len(inputs)
    lengths = [len(completion.token_ids) for completion in completions]
    return PackedBatch(
        input_ids=_int64(input_ids),
        position_ids=torch.from_numpy(np.concatenate(positions, axis=1).astype(np.int64)),
        branch_ids=_int64(branches),
        row_lengths=torch.tensor([row.num_tokens for row in rows]),
        predict_from=_int64(predict_from),
        targets=_int64([completion.token_ids for completion in completions]),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        actor_logprobs=_float32([completion.logprobs for completion in completions]),
        versions=_int64([_token_versions(completion) for completion in completions]),
        advantages=torch.tensor([value for row in rows for value in row.advantages], dtype=torch.float32),
        truncated=torch.tensor([each.finish_reason is FinishReason.LENGTH for each in completions], dtype=torch.bool),
        media=_media(rows),
    )


def _rows(group: Group, advantages: FloatArray, share_prefix: bool, max_tokens: int, cost: ModelCost) -> list[Row]:
    """The rows of a group: each completion joins the last row where that fits and costs less than a row of its own."""
    if len(advantages) != len(group.completions):
        raise ValueError(
            f"group {group.group_id} has {len(group.completions)} completions but {len(advantages)} advantages"
        )
    rows: list[Row] = []
    for completion, advantage in zip(group.completions, advantages.tolist(), strict=True):
        if len(completion.token_ids) == 0:
            raise ValueError(f"completion {completion.trajectory_id} has no tokens")
        alone = Row(group.processed, (completion,), (advantage,))
        if share_prefix and rows:
            last = rows[-1]
            joined = Row(last.prompt, (*last.completions, completion), (*last.advantages, advantage))
            added_cost = cost.text(joined.num_tokens) - cost.text(last.num_tokens)
            alone_cost = cost.text(alone.num_tokens) + cost.images(alone.prompt.media)
            if joined.num_tokens <= max_tokens and added_cost <= alone_cost:
                rows[-1] = joined
                continue
        rows.append(alone)
    return rows


def _pack_or_fill(rows: Sequence[Row], filler: ProcessedPrompt | None, empty: ProcessedPrompt) -> PackedBatch:
    if not rows:
        return pack([Row(empty)])
    if filler is not None and not any(row.prompt.media for row in rows):
        return pack([*rows, Row(filler)])
    return pack(rows)


def _blank(like: ProcessedPrompt) -> ProcessedPrompt:
    """One token, for the pack of a rank that has nothing left to do."""
    position_ids = np.zeros((len(like.position_ids), 1), np.int64)
    return ProcessedPrompt(np.zeros(1, np.int32), position_ids, 1, {}, (), ())


def _media(rows: Sequence[Row]) -> dict[str, Tensor]:
    joined = extract_multi_modal_inputs([row.prompt.media for row in rows])
    tensors = {key: value for key, value in joined.items() if isinstance(value, Tensor)}
    if len(tensors) != len(joined):
        raise ValueError("this model takes its media as lists for each row, which a packed batch cannot hold")
    return tensors


def _token_versions(completion: Completion) -> np.ndarray:
    spans = completion.version_spans
    versions = np.repeat([span.policy_version for span in spans], [span.end - span.start for span in spans])
    if len(versions) != len(completion.token_ids):
        raise ValueError(
            f"completion {completion.trajectory_id} has {len(completion.token_ids)} tokens, but its version spans "
            f"cover {len(versions)}"
        )
    return versions


def _int64(parts: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64))


def _float32(parts: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *parts]).astype(np.float32))
