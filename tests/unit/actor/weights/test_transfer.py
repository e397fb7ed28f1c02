"""The receiving end over a real process group: what is staged is what was sent, whole or as a delta."""

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash

from actor.weights.transfer import NamedTensors, WeightReceiver
from common import delta
from common.collective import BroadcastGroup
from common.errors import InvalidRequest, StageCorrupt
from common.types import EpochSpec, Manifest, ManifestBucket, ManifestParameter

NUM_BUCKETS = 5
TIMEOUT_S = 20.0


class Recording:
    """Copies of what it gets."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.is_finished = False
        self.is_discarded = False
        self.threads: set[int] = set()

    def add(self, tensors: NamedTensors) -> None:
        self.threads.add(threading.get_ident())
        self.tensors |= {name: tensor.clone() for name, tensor in tensors}

    def finish(self) -> None:
        self.threads.add(threading.get_ident())
        self.is_finished = True

    def discard(self) -> None:
        self.is_discarded = True


class Wire:
    """A sender and a receiver that are in one epoch."""

    def __init__(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._epoch = 0
        self.receiver = WeightReceiver()
        self.sender: BroadcastGroup
        self.open()

    def open(self) -> None:
        self._epoch += 1
        spec = EpochSpec("run", self._epoch, "127.0.0.1", self._store.port, 2, 0, "gloo", TIMEOUT_S)
        joined = self.receiver.join(spec, 1)
        self.sender = BroadcastGroup(spec, 0)
        joined.result(TIMEOUT_S)

    def close(self) -> None:
        self.receiver.leave()
        self.sender.abort()

    def send(self, manifest: Manifest, buffers: list[torch.Tensor]) -> tuple[Recording, "Future[tuple[int, ...]]"]:
        staging = Recording()
        future = self.receiver.receive(manifest, staging)
        for buffer in buffers:
            self.sender.broadcast(buffer)
        return staging, future


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


def weights(version: int) -> list[torch.Tensor]:
    """Buckets of one tensor each, of several sizes."""
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(1000 * (i + 1), generator=generator) for i in range(NUM_BUCKETS)]
    for tensor in tensors:
        tensor[::10] += version
    return [tensor.bfloat16().view(torch.uint8) for tensor in tensors]


def manifest_of(buffers: list[torch.Tensor], version: int, **fields: Any) -> Manifest:
    parameters = tuple(
        ManifestParameter(f"w{i}", "BF16", (buffer.numel() // 2,), i, 0) for i, buffer in enumerate(buffers)
    )
    buckets = tuple(
        ManifestBucket(b.numel(), xxhash.xxh3_64_intdigest(b.numpy().tobytes()), keep=True) for b in buffers
    )
    return Manifest(version, parameters, buckets, updates_vision=False, **fields)


def delta_of(old: int, new: int) -> tuple[Manifest, list[torch.Tensor]]:
    manifest = manifest_of(weights(new), new, base_version=old)
    deltas = [delta.encode(before, after, 2) for before, after in zip(weights(old), weights(new), strict=True)]
    buckets = tuple(
        dataclasses.replace(bucket, delta_bytes=encoded.numel(), word_bytes=2)
        for bucket, encoded in zip(manifest.buckets, deltas, strict=True)
    )
    return dataclasses.replace(manifest, buckets=buckets), deltas


def check(staging: Recording, result: "Future[tuple[int, ...]]", version: int) -> None:
    expected = weights(version)
    assert result.result(TIMEOUT_S) == tuple(xxhash.xxh3_64_intdigest(b.numpy().tobytes()) for b in expected)
    assert staging.is_finished
    for i, buffer in enumerate(expected):
        assert torch.equal(staging.tensors[f"w{i}"].view(torch.uint8), buffer)


def test_every_update_arrives_whole(wire: Wire) -> None:
    """More buckets than buffers; the next update uses the memory of the one before."""
    for version in (1, 2):
        buffers = weights(version)
        staging, result = wire.send(manifest_of(buffers, version), buffers)
        check(staging, result, version)
        assert wire.receiver.take(version, Recording) is staging


def test_one_thread_works_on_all_updates(wire: Wire) -> None:
    """What malloc keeps for a thread would stay behind with each: a model's worth of memory, and again and again."""
    threads = set()
    for version in (1, 2):
        staging, result = wire.send(manifest_of(weights(version), version), weights(version))
        check(staging, result, version)
        threads |= staging.threads
        wire.close()
        wire.open()
    assert len(threads) == 1


def test_deltas_follow_a_full_update_and_each_other_over_epochs(wire: Wire) -> None:
    buffers = weights(1)
    check(*wire.send(manifest_of(buffers, 1), buffers), version=1)
    manifest, deltas = delta_of(1, 2)
    assert sum(map(len, deltas)) < sum(map(len, buffers)) / 4
    check(*wire.send(manifest, deltas), version=2)
    wire.close()
    wire.open()
    check(*wire.send(*delta_of(2, 3)), version=3)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_delta_from_what_is_not_here_is_refused(wire: Wire, keeps: bool) -> None:
    buffers = weights(1)
    manifest = manifest_of(buffers, 1)
    if not keeps:
        buckets = tuple(dataclasses.replace(bucket, keep=False) for bucket in manifest.buckets)
        manifest = dataclasses.replace(manifest, buckets=buckets)
    check(*wire.send(manifest, buffers), version=1)
    base = 0 if keeps else 1
    with pytest.raises(InvalidRequest, match=f"manifest.base_version: (version {base}|the buckets)") as raised:
        wire.receiver.receive(delta_of(base, 2)[0], Recording())
    assert raised.value.field == "manifest.base_version"
    # What was kept went with it.
    with pytest.raises(InvalidRequest):
        wire.receiver.receive(delta_of(1, 2)[0], Recording())


def test_a_delta_to_another_result_is_seen_and_ends_the_chain(wire: Wire) -> None:
    buffers = weights(1)
    check(*wire.send(manifest_of(buffers, 1), buffers), version=1)
    manifest, _ = delta_of(1, 3)
    _, deltas = delta_of(1, 2)
    buckets = tuple(
        dataclasses.replace(bucket, delta_bytes=encoded.numel())
        for bucket, encoded in zip(manifest.buckets, deltas, strict=True)
    )
    _, result = wire.send(dataclasses.replace(manifest, buckets=buckets), deltas)
    assert result.result(TIMEOUT_S) != tuple(bucket.xxh3 for bucket in manifest.buckets)
    with pytest.raises(InvalidRequest):
        wire.receiver.receive(delta_of(3, 4)[0], Recording())


def test_what_fails_half_way_is_discarded(wire: Wire) -> None:
    buffers = weights(1)
    staging, received = wire.send(manifest_of(buffers, 1), buffers[:2])
    wire.sender.abort()
    wire.receiver.leave()
    with pytest.raises(RuntimeError):
        received.result(TIMEOUT_S)
    assert staging.is_discarded
    assert not staging.is_finished


def test_bytes_that_are_no_delta_are_corrupt(wire: Wire) -> None:
    buffers = weights(1)
    check(*wire.send(manifest_of(buffers, 1), buffers), version=1)
    manifest, deltas = delta_of(1, 2)
    deltas[-1] = deltas[-1].flip(0)
    _, result = wire.send(manifest, deltas)
    with pytest.raises(StageCorrupt, match="bucket 4 came as no delta"):
        result.result(TIMEOUT_S)
    with pytest.raises(RuntimeError, match="version 2 is not staged"):
        wire.receiver.take(2, Recording)
