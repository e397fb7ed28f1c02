"""Whether an update goes out as a delta: what changed since the version that all members have.

    a delta is sent if   2 * encoding + delta / link  <  full / link      (in seconds; the members decode as we encode)

Link is the speed at which the last update was staged; encoding and the size of the delta are extrapolated from the
largest bucket, which is encoded first. In float32 nearly every element changes at every step, in bfloat16 few do.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common import delta
from common.dtypes import TORCH_DTYPES
from common.errors import InvalidRequest, OutriderError
from common.log import get_logger
from common.process.threads import to_own_thread
from learner.rollouts.members import Member
from learner.weights.buckets import Buckets, Update
from learner.weights.epoch import UpdateTimes
from learner.weights.snapshot import Snapshot

log = get_logger(__name__)

_clock_s = time.monotonic


@dataclass(frozen=True, slots=True)
class Base:
    """What members keep: the part of this snapshot that trains."""

    version: int
    buckets: Buckets
    actor_ids: frozenset[str]


class Deltas:
    """What the members of the last update keep, and how fast the link to them is. `enabled`: by a setting."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._base: Base | None = None
        self._link_bytes_s: float | None = None

    async def choose(self, snapshot: Snapshot, members: Sequence[Member]) -> Update | None:
        """The update as a delta if that is possible and faster, else None. Then say `sent` or `failed`."""
        (base, self._base), link = (self._base, None), self._link_bytes_s
        if not self.enabled or base is None or link is None or snapshot.adapter is not None:
            return None
        if not base.actor_ids.issuperset(member.actor_id for member in members):
            return None
        return await self._encode(base, snapshot, link)

    async def _encode(self, base: Base, snapshot: Snapshot, link_bytes_s: float) -> Update | None:
        return await to_own_thread("encode-delta", _encode, base, snapshot, link_bytes_s)

    def sent(self, snapshot: Snapshot, members: Sequence[Member], times: UpdateTimes) -> None:
        """All members have it."""
        if not self.enabled or snapshot.adapter is not None:
            return
        if times.num_bytes >= snapshot.trained.num_bytes:  # a delta says little about the link
            self._link_bytes_s = times.num_bytes / times.stage_s
        self._base = Base(snapshot.version, snapshot.trained, frozenset(member.actor_id for member in members))

    def failed(self) -> None:
        """Nobody knows what the members keep."""
        self._base = None

    def is_refusal(self, error: OutriderError) -> bool:
        """Whether a member could not use the delta, and is well otherwise."""
        return isinstance(error, InvalidRequest) and error.field == "manifest.base_version"


def _encode(base: Base, snapshot: Snapshot, link_bytes_s: float) -> Update | None:
    manifest, buffers, checksums = snapshot.update(full=False, keep=True)
    words, total = _word_bytes(snapshot.trained), snapshot.trained.num_bytes
    first = max(range(len(buffers)), key=lambda i: buffers[i].numel())
    started_at = _clock_s()
    deltas = {first: delta.encode(base.buckets.buffers[first], buffers[first], words[first])}
    scale = total / buffers[first].numel()
    encode_s, delta_bytes = (_clock_s() - started_at) * scale, deltas[first].numel() * scale
    is_faster = 2 * encode_s + delta_bytes / link_bytes_s < total / link_bytes_s
    log.info(
        "sending a delta" if is_faster else "a full update is faster than a delta",
        version=snapshot.version,
        encode_s=round(encode_s, 3),
        share_of_bytes=round(delta_bytes / total, 4),
        link_mb_s=round(link_bytes_s / 1e6, 1),
    )
    if not is_faster:
        return None
    for i, buffer in enumerate(buffers):
        if i != first:
            deltas[i] = delta.encode(base.buckets.buffers[i], buffer, words[i])
    sent = tuple(deltas[i] for i in range(len(buffers)))
    buckets = tuple(
        replace(bucket, delta_bytes=encoded.numel(), word_bytes=word)
        for bucket, encoded, word in zip(manifest.buckets, sent, words, strict=True)
    )
    return Update(replace(manifest, buckets=buckets, base_version=base.version), sent, checksums)


def _word_bytes(buckets: Buckets) -> list[int]:
    """The size of the smallest element in each bucket."""
    words = [8] * len(buckets.buffers)
    for parameter in buckets.parameters:
        words[parameter.bucket] = min(words[parameter.bucket], TORCH_DTYPES[parameter.dtype].itemsize)
    return words
