"""What an actor answers: how it understood the prompt, and the completions of the group."""

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.tensors import NamedTensor, Tensor
from common.types.media import Modality, PlaceholderRange

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


class FinishReason(enum.Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"


@dataclass(frozen=True, slots=True)
class MediaUse:
    """What the actor did with one media item; the learner holds it against its own processor."""

    sha256: bytes
    placeholder: PlaceholderRange
    num_tokens: int
    grid_thw: tuple[int, ...] = ()
    modality: Modality = Modality.IMAGE
    processed: tuple[NamedTensor, ...] = ()


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The most likely ids at one place and their logprobs, most likely first."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """How the actor understood a prompt. `expanded_ids` are the ids that the model saw.

    `prompt_logprobs[t]` is the model's own logprob of `expanded_ids[t]`, 0 for the first; empty unless asked for. They
    and the alternatives are of one policy version, which need not be that of the completions.
    """

    group_id: str
    actor_id: str
    unexpanded_ids: IntArray
    expanded_ids: IntArray
    media: tuple[MediaUse, ...] = ()
    suppressed_token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs_policy_version: int | None = None


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `[start, end)` of a completion were sampled by `policy_version`."""

    policy_version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class BeamScore:
    """How well a beam did: its summed logprob, and that by the length penalty, which ranks beams."""

    cumulative_logprob: float
    score: float


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sample of a group.

    `logprobs[t]` is the natural log of the probability of `token_ids[t]` under the distribution that it was sampled
    from (after temperature, truncation and suppression). `stop` is the stop id or string that ended it, None for the
    end-of-sequence id. With `beam` it is no sample, but what a beam search found. `routed_experts`, on request, are
    `[tokens, layers, experts per token]` for the tokens that the model was given: the prompt and all but the last.
    """

    trajectory_id: str
    index: int
    token_ids: IntArray
    logprobs: FloatArray
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...]
    first_token_s: float = 0.0
    finished_s: float = 0.0
    text: str = ""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    stop: int | str | None = None
    beam: BeamScore | None = None
    routed_experts: Tensor | None = None
