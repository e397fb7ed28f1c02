"""What vLLM reports of one completion, piece by piece, and the `Completion` that it makes in the end."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actor.engine import EngineRequest
from common.errors import EngineDead, InvalidRequest
from common.tensors import Tensor, tensor_of
from common.types import Completion, FinishReason, SamplingParams, TopLogprobs, VersionSpan

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

_REASONS = {reason.value: reason for reason in FinishReason}


class NothingSampled(EngineDead):
    """vLLM gave a completion up before its first token."""


class NoProbability(InvalidRequest):
    """No token had a probability after `token_ids`: it is the constraints that left none, or the model has diverged.

    The two look the same; `probes.probe_model` tells them apart.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        super().__init__("sampling", "its constraints together leave no token to sample")
        self.token_ids = tuple(token_ids)


@dataclass(slots=True)
class Sample:
    """What vLLM has reported of one completion so far."""

    first_token_s: float
    num_top: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Any] = field(default_factory=list)
    """vLLM's flat logprobs of each piece, where alternatives are wanted: made into ours at the end."""
    text: str = ""

    def add(self, part: "CompletionOutput") -> None:
        """Append what is new."""
        flat: Any = part.logprobs
        self.token_ids.extend(part.token_ids)
        self.text += part.text
        if flat is None:
            return
        self.logprobs.extend(flat.logprobs[start] for start in flat.start_indices)  # the sampled token comes first
        if self.num_top:
            self.alternatives.append(flat)

    def completion(
        self, last: "CompletionOutput", request: EngineRequest, trajectory_id: str, *, finished_s: float
    ) -> Completion:
        """The whole, when `last` was its end; 30 ms for 80,000 alternatives.

        Raises InvalidRequest for constraints that end it, and EngineDead.
        """
        if last.finish_reason == "error" and not self.token_ids:
            raise NothingSampled("the engine could not begin a completion")
        self._check_finite(request.sampling)  # first: a grammar rejects what was drawn without a probability
        if last.finish_reason == "error" and request.sampling.structured_output is not None:  # see `bound_matching`
            raise InvalidRequest("sampling.structured_output", "takes too long to match; write it less ambiguously")
        reason = _finish_reason(last.finish_reason)
        return Completion(
            trajectory_id=trajectory_id,
            index=last.index,
            token_ids=np.asarray(self.token_ids, np.int32),
            logprobs=np.asarray(self.logprobs, np.float32),
            finish_reason=reason,
            version_spans=tuple(
                VersionSpan(int(span.version), span.start, span.end) for span in last.weight_versions or []
            ),
            first_token_s=self.first_token_s,
            finished_s=finished_s,
            text=self.text if request.return_text else "",
            top_logprobs=tuple(
                top_logprobs(flat, place) for flat in self.alternatives for place in range(len(flat.start_indices))
            ),
            stop=last.stop_reason if reason is FinishReason.STOP else None,
            routed_experts=_experts(last.routed_experts) if request.return_routed_experts else None,
        )

    def _check_finite(self, wanted: SamplingParams) -> None:
        """Raises NoProbability where it can be the constraints' fault, and EngineDead."""
        num_finite = len(list(itertools.takewhile(math.isfinite, self.logprobs)))
        if num_finite < len(self.logprobs):
            if _can_leave_nothing(wanted):
                raise NoProbability(self.token_ids[:num_finite])
            raise diverged()


def diverged() -> EngineDead:
    """What is raised where the model's logits are no numbers, or infinite: nothing of it may become a rollout."""
    return EngineDead("the model gave no finite probability")


def _can_leave_nothing(wanted: SamplingParams) -> bool:
    """Whether constraints can meet so that every id is masked; alone, each was checked to leave some.

    Without that, a probability that is no number is the model's.
    """
    by_ids = wanted.allowed_token_ids or wanted.bad_token_ids
    by_moment = wanted.min_tokens or wanted.bad_words
    if wanted.structured_output is not None or (wanted.min_tokens and wanted.stop_token_ids):
        return True
    return bool(by_ids and by_moment)


def _experts(found: Any) -> Tensor:
    """vLLM's `[tokens, layers, experts per token]`, which come with the end, in the smallest unsigned type."""
    if found is None:
        raise EngineDead("the engine gave no routed experts")
    return tensor_of(found.astype(np.int16 if found.dtype.itemsize == 1 else np.int32))


def top_logprobs(flat: Any, place: int) -> TopLogprobs:
    """The most likely ids at one place of vLLM's flat logprobs, without those of probability 0. Raises EngineDead."""
    start, end = flat.start_indices[place] + 1, flat.end_indices[place]  # the sampled token comes first
    token_ids, logprobs = flat.token_ids[start:end], flat.logprobs[start:end]
    if math.isfinite(sum(logprobs)):  # as nearly always: all of them are
        return TopLogprobs(tuple(token_ids), tuple(logprobs))
    if not all(logprob < math.inf for logprob in logprobs):
        raise diverged()
    pairs = [pair for pair in zip(token_ids, logprobs, strict=True) if pair[1] > -math.inf]
    return TopLogprobs(tuple(token_id for token_id, _ in pairs), tuple(logprob for _, logprob in pairs))


def spans_of(versions: tuple[int, ...]) -> tuple[VersionSpan, ...]:
    """The policy version of each token as spans.

    Example: `(3, 3, 4)` is `VersionSpan(3, 0, 2), VersionSpan(4, 2, 3)`.
    """
    spans: list[VersionSpan] = []
    for version, run in itertools.groupby(versions):
        start = spans[-1].end if spans else 0
        spans.append(VersionSpan(version, start, start + len(list(run))))
    return tuple(spans)


def _finish_reason(reason: str | None) -> FinishReason:
    """Raises EngineDead for a completion that vLLM broke off: what there is of it is no sample of the policy."""
    if reason not in _REASONS:
        raise EngineDead(f"the engine broke a completion off ({reason})")
    return _REASONS[reason]
