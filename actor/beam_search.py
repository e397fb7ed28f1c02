"""Beam search over an engine that gives the most likely next tokens of a sequence; vLLM's own algorithm.

At each step every live beam is extended by its `2 * num_beams` most likely tokens. Those that end a sequence finish a
beam; of the others the `num_beams` with the largest summed logprob live on. In the end finished and live beams compete
by

    score = sum of logprobs / (prompt tokens + completion tokens, without the end-of-sequence id) ** length_penalty

(vLLM 0.32, `entrypoints/generate/beam_search`). Where vLLM goes on to `max_tokens` in every case, this stops as soon as
no live beam can still come among the best: logprobs are never positive, so a beam's best possible score is known.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NextTokens:
    """What may follow a beam: ids and logprobs by falling probability, and the policy version that said so."""

    policy_version: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FoundBeam:
    """A sequence of completion tokens with what each cost. `is_finished`: it ends with an end-of-sequence id."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    versions: tuple[int, ...] = ()
    cumulative_logprob: float = 0.0
    is_finished: bool = False

    def extended(self, token_id: int, logprob: float, version: int, *, is_finished: bool) -> "FoundBeam":
        """This beam and one more token."""
        return FoundBeam(
            (*self.token_ids, token_id),
            (*self.logprobs, logprob),
            (*self.versions, version),
            self.cumulative_logprob + logprob,
            is_finished,
        )


# The most likely continuations of each beam, in the order of the beams.
Extend = Callable[[Sequence[FoundBeam]], Awaitable[Sequence[NextTokens]]]


class BeamSearch:
    """One search. `eos_ids` end a beam; empty to ignore them.

    Args:
        num_beams: beams that live at once, and the most that are found.
        max_tokens: longest completion.
        num_prompt_tokens: of the expanded prompt; counts in the score.
    """

    def __init__(
        self,
        *,
        num_beams: int,
        max_tokens: int,
        num_prompt_tokens: int,
        eos_ids: Collection[int],
        length_penalty: float,
    ) -> None:
        self._num_beams = num_beams
        self._max_tokens = max_tokens
        self._num_prompt_tokens = num_prompt_tokens
        self._eos_ids = eos_ids
        self._length_penalty = length_penalty

    async def run(self, extend: Extend) -> list[FoundBeam]:
        """The best beams, best first."""
        live = [FoundBeam()]
        finished: list[FoundBeam] = []
        for _ in range(self._max_tokens):
            candidates: list[FoundBeam] = []
            for beam, following in zip(live, await extend(live), strict=True):
                for token_id, logprob in zip(following.token_ids, following.logprobs, strict=True):
                    ends = token_id in self._eos_ids
                    extended = beam.extended(token_id, logprob, following.policy_version, is_finished=ends)
                    (finished if ends else candidates).append(extended)
            live = sorted(candidates, key=lambda beam: beam.cumulative_logprob, reverse=True)[: self._num_beams]
            finished = sorted(finished, key=self.score, reverse=True)[: self._num_beams]
            if not self._can_improve(live, finished):
                break
        return sorted([*finished, *live], key=self.score, reverse=True)[: self._num_beams]

    def score(self, beam: FoundBeam) -> float:
        """What beams are ranked by."""
        return self._score(beam.cumulative_logprob, len(beam.token_ids) - beam.is_finished)

    def _score(self, cumulative_logprob: float, num_tokens: int) -> float:
        length = max(1, self._num_prompt_tokens + num_tokens)
        divisor: float = length**self._length_penalty
        return cumulative_logprob / divisor

    def _can_improve(self, live: Sequence[FoundBeam], finished: Sequence[FoundBeam]) -> bool:
        if not live:
            return False
        if len(finished) < self._num_beams:
            return True
        # What a beam could reach if every further token were certain, at the length that flatters it most.
        length = self._max_tokens if self._length_penalty > 0 else len(live[0].token_ids)
        return self._score(live[0].cumulative_logprob, length) > self.score(finished[-1])
