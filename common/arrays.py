"""Groups as the padded arrays that verl's and ROLL's trainers take.

One row per completion, prompt-major: the `n` rows of the first prompt, then those of the second. A row is the expanded
prompt, padded on the left to the longest one (`P`), and the completion, padded on the right to the longest one (`R`).

Example, with pad id 0: the prompt `[5, 6]` with the completions `[7]` and `[8, 9]`, the prompt `[4]` with `[3]`:

    input_ids       5 6 7 0     attention_mask  1 1 1 0     response_mask  1 0     old_log_probs  -.1   0
                    5 6 8 9                     1 1 1 1                    1 1                    -.2 -.3
                    0 4 3 0                     0 1 1 0                    1 0                    -.4   0
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from common.types import Completion, IntArray, PromptInfo

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


class SampledPrompt(Protocol):
    """A prompt and its completions, as `common.client.SampledGroup`."""

    @property
    def prompt(self) -> PromptInfo:
        """How the actor understood the prompt."""
        ...

    @property
    def completions(self) -> tuple[Completion, ...]:
        """In the order of their rows."""
        ...


@dataclass(frozen=True, slots=True)
class RolloutArrays:
    """Names and shapes are verl's; `B` rows in all, of `P + R` ids.

    `position_ids` are those of text: 0 at the first token of a prompt and before it, counted on to the end of the row.
    (Models with positions in three dimensions compute their own from `input_ids` and the image grids.) `old_log_probs`
    and `response_mask` are 0 where a row has no completion token. `group_ids[row]` is the index of the row's prompt.
    """

    prompts: Int64Array
    responses: Int64Array
    input_ids: Int64Array
    attention_mask: Int64Array
    position_ids: Int64Array
    response_mask: Int64Array
    old_log_probs: Float32Array
    group_ids: Int64Array


def rollout_arrays(
    groups: Sequence[SampledPrompt],
    pad_token_id: int,
    *,
    prompt_length: int | None = None,
    response_length: int | None = None,
    allow_beams: bool = False,
) -> RolloutArrays:
    """The array view of groups.

    `prompt_length` and `response_length` replace `P` and `R`. Raises ValueError for no completion at all, for what is
    longer than these, and, without `allow_beams`, for beams: their logprobs are those of no sample.
    """
    rows = [(group, completion) for group in groups for completion in group.completions]
    if not rows:
        raise ValueError("no completions: there is nothing to make arrays of")
    for _, completion in rows:
        if completion.beam is not None and not allow_beams:
            raise ValueError(f"{completion.trajectory_id} was found by beam search; it is no sample of a policy")
    completions = [completion.token_ids for _, completion in rows]
    # The prompts once each, then as often as they have completions.
    counts = [len(group.completions) for group in groups]
    own, own_mask = _padded([group.prompt.expanded_ids for group in groups], pad_token_id, prompt_length, left=True)
    prompts, prompt_mask = np.repeat(own, counts, axis=0), np.repeat(own_mask, counts, axis=0)
    responses, response_mask = _padded(completions, pad_token_id, response_length, left=False)
    logprobs = np.zeros(responses.shape, np.float32)
    for row, (_, completion) in zip(logprobs, rows, strict=True):
        row[: len(completion.logprobs)] = completion.logprobs
    attention_mask = np.concatenate([prompt_mask, response_mask], axis=1)
    prompt_positions = np.maximum(np.cumsum(prompt_mask, axis=1) - 1, 0)
    response_positions = prompt_positions[:, -1:] + np.arange(1, responses.shape[1] + 1)
    return RolloutArrays(
        prompts=prompts,
        responses=responses,
        input_ids=np.concatenate([prompts, responses], axis=1),
        attention_mask=attention_mask,
        position_ids=np.concatenate([prompt_positions, response_positions], axis=1),
        response_mask=response_mask,
        old_log_probs=logprobs,
        group_ids=np.repeat(np.arange(len(groups)), counts),
    )


def _padded(
    rows: Sequence[IntArray], pad_token_id: int, length: int | None, *, left: bool
) -> tuple[Int64Array, Int64Array]:
    """Rows of one length, and a mask that is 1 where they hold what was there."""
    longest = max(map(len, rows))
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"{'a prompt' if left else 'a completion'} of {longest} tokens; the arrays have {length}")
    ids = np.full((len(rows), length), pad_token_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask
