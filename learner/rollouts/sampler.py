"""One group, whatever happens to the actors: asked for, checked, and asked for again elsewhere if it must be.

Training and evaluation both sample through here. A group is one actor's work from end to end: what a failed call had
already sent is thrown away, and the whole group is sampled again, under a new group id, so that no trajectory can be
counted twice.
"""

import asyncio
import collections
import dataclasses
from collections.abc import Callable

from common.client import SampledGroup
from common.errors import (
    Draining,
    InvalidRequest,
    MediaMissing,
    OutriderError,
    Paused,
    QueueFull,
    TooLarge,
    Unimplemented,
    Unreachable,
    WeightsPending,
)
from common.log import get_logger
from common.media import content_hash
from common.types import MediaItem, RolloutRequest, SamplingParams
from learner.rollouts.fleet import Fleet
from learner.rollouts.members import LAST_WORDS_S, Member
from learner.rollouts.scheduling import ActorHung
from learner.rollouts.tripwire import ImageMismatch, check_images
from learner.types import ProcessedPrompt, PromptSample

log = get_logger("learner.rollouts.sampler")

# The request itself is at fault; or an actor that has smaller limits than the others, or is an older one.
_REFUSALS = (InvalidRequest, TooLarge, Unimplemented)
# The actor is only not available now: this says nothing about the request.
_NOT_NOW = (Draining, Paused, QueueFull, WeightsPending)
# Until a media store that others fill may have room: at first, twice as long each time, and at most.
_ROOM_WAIT_S = 0.2
_LONGEST_ROOM_WAIT_S = 5.0

# A group that no update lets finish goes on across the next one.
_MAX_RESTARTS = 3


class _PolicyChanged(Exception):  # noqa: N818 - says what happened
    """The actor went over to another version while it worked on a group that is to have one only."""


class GroupFailed(Exception):  # noqa: N818 - as the group's state
    """This group cannot be sampled. `reason` is UPPER_SNAKE, for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def build_request(
    group_id: str, sample: PromptSample, sampling: SamplingParams, *, return_text: bool = False
) -> RolloutRequest:
    """The request for one sample: its messages as a chat, its images as encoded files with their hashes."""
    media = tuple(
        MediaItem(content_hash(image), image, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)
        for image, bounds in sample.bounded_images
    )
    return RolloutRequest(group_id, sample.chat, media, sampling, return_text=return_text)


class Sampler:
    """Samples groups on the fleet. Belongs to the fleet's event loop.

    Args:
        fleet: where the actors come from.
        group_timeout_s: deadline of one group on one actor; past it the group is sent to another.
        max_attempts: failures of one group (deaths, deadlines, broken answers; not "busy" or "draining") after which it
            is given up, in case it is the group that kills the actors.
        restart_on_update: a group whose actor goes over to another policy version is broken off and sampled again from
            its prompt, up to three times. Otherwise, and the fourth time, it goes on, and its version spans say so.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        group_timeout_s: float = 120.0,
        max_attempts: int = 8,
        restart_on_update: bool = False,
    ) -> None:
        self.fleet = fleet
        self.retries: collections.Counter[str] = collections.Counter()
        """How often a group was sent again, by reason."""
        self._group_timeout_s = group_timeout_s
        self._max_attempts = max_attempts
        self._max_restarts = _MAX_RESTARTS if restart_on_update else 0

    async def sample(
        self, request: RolloutRequest, *, min_version: Callable[[], int], expected: ProcessedPrompt | None
    ) -> SampledGroup:
        """Sample one group on some actor that serves `min_version()` or newer.

        With `expected`, the answer must pass the image tripwire. Raises `ImageMismatch`, and `GroupFailed` for a
        request that an actor refuses whose word counts (`Fleet.believes`), or that has failed too often.
        """
        failures = restarts = attempt = times_full = 0
        failed_on: frozenset[str] = frozenset()
        media = [item.sha256 for item in request.media]
        while True:
            wait_s = 0.0
            async with self.fleet.slot(min_version, failed_on, media) as member:
                asked = dataclasses.replace(
                    request,
                    group_id=f"{request.group_id}.{attempt}",
                    min_policy_version=max(0, min_version()),
                    run_id=self.fleet.run_id or "",
                )
                try:
                    started_at = asyncio.get_running_loop().time()
                    sampled = await self._call(member, asked, may_restart=restarts < self._max_restarts)
                    if expected is not None:
                        check_images(expected, sampled.prompt, sampled.completions)
                    self.fleet.report_success(member, asyncio.get_running_loop().time() - started_at)
                    return sampled
                except ImageMismatch:
                    raise
                except _PolicyChanged:
                    self.retries["POLICY_CHANGED"] += 1
                    restarts += 1
                except OutriderError as error:
                    if isinstance(error, _REFUSALS) and self.fleet.believes(member):
                        raise GroupFailed(error.reason, error.message) from error
                    if isinstance(error, MediaMissing):  # those of others pushed them out: the actor is well
                        wait_s = min(_LONGEST_ROOM_WAIT_S, _ROOM_WAIT_S * 2**times_full)
                        times_full += 1
                    else:
                        self.fleet.report_failure(member, error)
                    self.retries[error.reason] += 1
                    if not isinstance(error, _NOT_NOW):
                        failures += 1
                        failed_on |= {member.actor_id}
                    log.info(
                        "group is sent again", group_id=asked.group_id, address=member.address, reason=error.reason
                    )
                    if failures >= self._max_attempts:
                        raise GroupFailed(
                            "ATTEMPTS_EXHAUSTED", f"failed {failures} times, last: {error.message}"
                        ) from error
            attempt += 1
            if wait_s:
                await asyncio.sleep(wait_s)

    async def _call(self, member: Member, request: RolloutRequest, *, may_restart: bool) -> SampledGroup:
        """One call; ends when the fleet knows that the actor is gone, hangs or is another run's, not at the deadline.

        With `may_restart` it also ends, by `_PolicyChanged`, when the actor goes over to another version,
        or turns out to have done so.
        """
        call = asyncio.ensure_future(
            member.client.generate(
                request, timeout_s=self._group_timeout_s, on_progress=lambda: self.fleet.report_progress(member)
            )
        )
        interrupted = asyncio.ensure_future(member.interrupted.wait())
        updated = asyncio.ensure_future(member.updated.wait())
        try:
            ends = {call, interrupted, updated} if may_restart else {call, interrupted}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if member.left.is_set():
                await asyncio.wait({call}, timeout=LAST_WORDS_S)
            if call.done():
                sampled = call.result()
                if may_restart and _num_versions(sampled) > 1:  # it was the first to say so
                    raise _PolicyChanged
                return sampled
            if updated.done() and not interrupted.done():
                raise _PolicyChanged
            if member.left.is_set():
                raise Unreachable(f"{member.address} left the fleet: {member.reason}")
            if member.version < 0:
                raise WeightsPending(f"{member.address} was taken over by another run")
            raise ActorHung(f"{member.address} hangs")
        finally:
            for future in (call, interrupted, updated):
                future.cancel()
            await asyncio.gather(call, interrupted, updated, return_exceptions=True)


def _num_versions(sampled: SampledGroup) -> int:
    spans = (span for completion in sampled.completions for span in completion.version_spans)
    return len({span.policy_version for span in spans})
