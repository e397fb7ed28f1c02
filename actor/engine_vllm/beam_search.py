"""Beam search over an engine that gives the most likely next tokens of a sequence; vLLM's own algorithm.

At each step every live beam is extended by its `2 * num_beams` most likely tokens. Those that end a sequence finish a
beam; of the others the `num_beams` with the largest summed logprob live on. In the end finished and live beams compete
by

    score = sum of logprobs / (prompt tokens + completion tokens, without the end-of-sequence id) ** length_penalty

(vLLM 0.32, `entrypoints/generate/beam_search`). Where vLLM goes on to `max_tokens` in every case, this stops as soon as
no live beam can still come among the best: logprobs are never positive, so a beam's best possible score is known.
"""

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


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


class _Candidate(NamedTuple):
    """A beam and what may follow it. Most are only weighed: a copy of the beam is made of those that are taken."""

    beam: FoundBeam
    token_id: int
    logprob: float
    version: int

    @property
    def cumulative_logprob(self) -> float:
        return self.beam.cumulative_logprob + self.logprob

    def taken(self, *, is_finished: bool) -> FoundBeam:
        return self.beam.extended(self.token_id, self.logprob, self.version, is_finished=is_finished)


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
            candidates = _candidates(live, await extend(live))
            ended = [candidate for candidate in candidates if candidate.token_id in self._eos_ids]
            going = [candidate for candidate in candidates if candidate.token_id not in self._eos_ids]
            live = [candidate.taken(is_finished=False) for candidate in self._likeliest(going)]
            finished += [candidate.taken(is_finished=True) for candidate in self._likeliest(ended)]
            finished = sorted(finished, key=self.score, reverse=True)[: self._num_beams]
            if not self._can_improve(live, finished):
                break
        return sorted([*finished, *live], key=self.score, reverse=True)[: self._num_beams]

    def _likeliest(self, candidates: Iterable[_Candidate]) -> list[_Candidate]:
        """As many as can be among the best. They are of one length, so that the score ranks them alike."""
        return sorted(candidates, key=lambda candidate: candidate.cumulative_logprob, reverse=True)[: self._num_beams]

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


def _candidates(live: Sequence[FoundBeam], following: Sequence[NextTokens]) -> list[_Candidate]:
    """Every continuation of every beam."""
    return [
        _Candidate(beam, token_id, logprob, tokens.policy_version)
        for beam, tokens in zip(live, following, strict=True)
        for token_id, logprob in zip(tokens.token_ids, tokens.logprobs, strict=True)
    ]
