"""When an update goes out as a delta, and what it then is."""

from typing import Any, cast

import pytest
import torch

from common import delta
from common.types import ActorState
from learner.rollouts.members import Member
from learner.weights import deltas as module
from learner.weights.buckets import BucketWriter
from learner.weights.deltas import Deltas
from learner.weights.epoch import UpdateTimes
from learner.weights.snapshot import Snapshot

FAST, SLOW = 1e12, 1e6  # bytes/s


def snapshot(version: int, *, dtype: torch.dtype = torch.bfloat16) -> Snapshot:
    """Two buckets of what trains; a thousandth of it differs between two versions."""
    tensors = {f"w{i}": torch.arange(200_000).remainder(251).to(dtype) for i in range(2)}
    for tensor in tensors.values():
        tensor[::1000] += version
    trained = BucketWriter(tensors.items(), 500_000).write(tensors.items())
    return Snapshot(version, trained, BucketWriter([], 1).write([]), trains_vision=False)


def member(actor_id: str) -> Member:
    return Member("one:1", cast("Any", None), 1, actor_id, ActorState.SERVING)


def sent(deltas: Deltas, taken: Snapshot, members: list[Member], link: float) -> None:
    num_bytes = taken.trained.num_bytes
    deltas.sent(taken, members, UpdateTimes(num_bytes / link, 0.0, num_bytes))


@pytest.fixture(autouse=True)
def encoding_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding one of the two buckets takes 10 ms, so that 40 ms count for both and for decoding."""
    now = iter(range(1_000_000))
    monkeypatch.setattr(module, "_clock_s", lambda: next(now) * 0.01)


async def test_on_a_slow_link_what_changed_is_sent() -> None:
    deltas, members = Deltas(enabled=True), [member("a")]
    first, second = snapshot(1), snapshot(2)
    sent(deltas, first, members, SLOW)
    chosen = await deltas.choose(second, members)
    assert chosen is not None
    manifest, buffers, _ = chosen
    assert (manifest.policy_version, manifest.base_version) == (2, 1)
    assert sum(buffer.numel() for buffer in buffers) < second.trained.num_bytes / 100
    for bucket, encoded, old, new in zip(
        manifest.buckets, buffers, first.trained.buffers, second.trained.buffers, strict=True
    ):
        result = old.clone()
        delta.apply(encoded, result, bucket.word_bytes)
        assert torch.equal(result, new)
        assert (bucket.delta_bytes, bucket.num_bytes, bucket.keep) == (encoded.numel(), new.numel(), True)
    # 800,000 bytes take 0.8 s, a delta 0.04 s.
    deltas.sent(second, members, UpdateTimes(0.04, 0.0, manifest.buckets[0].wire_bytes))
    assert await deltas.choose(snapshot(3), members) is not None


@pytest.mark.parametrize("link", [FAST, 800_000 / 0.039])
async def test_on_a_fast_link_all_is_sent(link: float) -> None:
    deltas, members = Deltas(enabled=True), [member("a")]
    sent(deltas, snapshot(1), members, link)
    assert await deltas.choose(snapshot(2), members) is None


async def test_only_to_those_that_keep_the_version_before() -> None:
    deltas, members = Deltas(enabled=True), [member("a"), member("b")]
    assert await deltas.choose(snapshot(1), members) is None  # nobody has anything
    sent(deltas, snapshot(1), members, SLOW)
    assert await deltas.choose(snapshot(2), [*members, member("c")]) is None
    assert await deltas.choose(snapshot(2), members) is None  # whatever became of the update before
    sent(deltas, snapshot(2), members, SLOW)
    assert await deltas.choose(snapshot(3), members[:1]) is not None
    deltas.failed()
    assert await deltas.choose(snapshot(3), members[:1]) is None


async def test_off_unless_asked_for() -> None:
    deltas, members = Deltas(enabled=False), [member("a")]
    sent(deltas, snapshot(1), members, SLOW)
    assert await deltas.choose(snapshot(2), members) is None
