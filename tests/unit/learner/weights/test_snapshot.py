"""Snapshots against the parameters that they were taken from, byte by byte."""

import asyncio
import math
import weakref
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import xxhash
from torch import nn

from common import wire
from common.dtypes import TORCH_DTYPES
from common.types import LORA_A, LORA_B, Manifest
from learner.model.lora import FILE_PREFIX, merge
from learner.weights import snapshot as module
from learner.weights.buckets import Buckets, BucketWriter, NotFilled
from learner.weights.snapshot import AdapterFacts, Snapshot, Snapshotter


class _Model(nn.Module):
    """Odd sizes, two dtypes, a tower, something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(3, 5)
        self.text = nn.Linear(7, 11, bias=False).to(torch.bfloat16)
        self.frozen = nn.Parameter(torch.randn(13), requires_grad=False)


def _read(manifest: Manifest, buffers: tuple[torch.Tensor, ...], _: object = None) -> dict[str, torch.Tensor]:
    """What a receiver makes of an update, by arithmetic of its own."""
    tensors = {}
    for parameter in manifest.parameters:
        dtype = TORCH_DTYPES[parameter.dtype]
        data = bytes(buffers[parameter.bucket].tolist())
        end = parameter.offset + math.prod(parameter.shape) * dtype.itemsize
        flat = torch.frombuffer(bytearray(data[parameter.offset : end]), dtype=dtype)
        tensors[parameter.name] = flat.reshape(parameter.shape)
    return tensors


def _snapshot(model: nn.Module, bucket_bytes: int = 2**20, version: int = 3) -> Snapshot:
    snapshot = Snapshotter(model, ["visual"], is_sender=True, bucket_bytes=bucket_bytes).take(version)
    assert snapshot is not None
    return snapshot


@pytest.mark.parametrize("bucket_bytes", [1, 64, 2**20])
def test_a_full_update_holds_every_parameter_bit_by_bit(bucket_bytes: int) -> None:
    model = _Model()
    manifest, buffers, _ = _snapshot(model, bucket_bytes).update(full=True)
    received = _read(manifest, buffers)
    assert received.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(received[name], parameter)
    assert [bucket.xxh3 for bucket in manifest.buckets] == [
        xxhash.xxh3_64_intdigest(bytes(b.tolist())) for b in buffers
    ]
    assert [bucket.num_bytes for bucket in manifest.buckets] == [b.numel() for b in buffers]
    assert wire.manifest_from_proto(wire.manifest_to_proto(manifest)) == manifest


def test_without_full_only_what_trains_is_sent() -> None:
    manifest, buffers, _ = _snapshot(_Model()).update(full=False)
    assert [p.name for p in manifest.parameters] == ["visual.weight", "visual.bias", "text.weight"]
    # 15 and 5 float32, 77 bfloat16, each rounded up to 16 bytes.
    assert sum(b.numel() for b in buffers) == 64 + 32 + 160
    assert manifest.policy_version == 3


def test_a_tensor_lies_in_one_bucket() -> None:
    manifest = _snapshot(_Model(), bucket_bytes=70).update(full=True).manifest
    assert [(p.bucket, p.offset) for p in manifest.parameters] == [(0, 0), (1, 0), (2, 0), (3, 0)]


@pytest.mark.parametrize(
    ("trains_vision", "full", "expected"), [(True, False, True), (False, False, False), (False, True, True)]
)
def test_updates_vision_says_whether_the_tower_is_among_them(trains_vision: bool, full: bool, expected: bool) -> None:
    model = _Model()
    model.visual.requires_grad_(trains_vision)
    manifest = _snapshot(model).update(full=full).manifest
    assert manifest.updates_vision is expected


def test_a_snapshot_does_not_change_with_the_model() -> None:
    model = _Model()
    before = model.text.weight.detach().clone()
    snapshot = _snapshot(model)
    with torch.no_grad():
        model.text.weight.zero_()
    assert torch.equal(_read(*snapshot.update(full=False))["text.weight"], before)


def test_weights_are_sent_in_another_dtype_rounded_once() -> None:
    model = _Model()
    taken = Snapshotter(model, [], is_sender=True, bucket_bytes=64, dtype=torch.bfloat16).take(1)
    assert taken is not None
    received = _read(*taken.update(full=True))
    for name, parameter in model.named_parameters():
        assert torch.equal(received[name], parameter.to(torch.bfloat16))


def test_only_what_trains_is_kept_for_a_delta() -> None:
    taken = _snapshot(_Model(), bucket_bytes=1)
    kept = [bucket.keep for bucket in taken.update(full=True, keep=True)[0].buckets]
    assert kept == [False, True, True, True]  # what is frozen comes first
    assert not any(bucket.keep for bucket in taken.update(full=True)[0].buckets)


def test_it_is_handed_over_before_it_is_filled_bucket_by_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Model()
    begun: list[Snapshot] = []
    num_filled: list[int] = []
    full = module._full

    def gathered(parameter: torch.Tensor) -> torch.Tensor:
        if begun:
            list(map(Future.result, begun[0].trained.checksums[: len(num_filled)]))  # what came before is there
            num_filled.append(sum(checksum.done() for checksum in begun[0].trained.checksums))
        return full(parameter)

    monkeypatch.setattr(module, "_full", gathered)

    def on_begin(snapshot: Snapshot) -> None:
        begun.append(snapshot)
        manifest, _, checksums = snapshot.update(full=True)
        assert [bucket.xxh3 is None for bucket in manifest.buckets] == [False, True, True, True]  # the first is frozen
        assert [checksum.done() for checksum in checksums] == [True, False, False, False]
        assert wire.manifest_from_proto(wire.manifest_to_proto(manifest)) == manifest

        assert not any(checksum.cancel() for checksum in checksums)  # by somebody who waits no longer

    taken = Snapshotter(model, ["visual"], is_sender=True, bucket_bytes=1).take(3, on_begin)
    assert num_filled == [0, 1, 2]
    assert begun == [taken]
    manifest, buffers, checksums = begun[0].update(full=True)
    assert [bucket.xxh3 for bucket in manifest.buckets] == [checksum.result() for checksum in checksums]
    received = _read(manifest, buffers)
    assert all(torch.equal(received[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("place", ["learner.weights.snapshot._full", "learner.weights.buckets.checksum"])
async def test_a_gather_that_breaks_off_leaves_nobody_waiting(place: str) -> None:
    begun: list[Snapshot] = []
    snapshotter = Snapshotter(_Model(), [], is_sender=True, bucket_bytes=1)
    assert snapshotter.take(1) is not None

    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a rank is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, broken)
        with pytest.raises(RuntimeError, match="a rank is gone"):
            snapshotter.take(2, begun.append)
    with pytest.raises(NotFilled):
        await asyncio.wait_for(begun[0].gathered(), 10)
    whole = snapshotter.take(3)
    assert whole is not None
    await whole.gathered()


def test_an_adapter_is_merged_into_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once would be the model once more."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def counted(*args: Any) -> torch.Tensor:
        merged = merge(*args)
        alive[:] = [tensor for tensor in alive if tensor() is not None] + [weakref.ref(merged)]
        counts.append(len(alive))
        return merged

    counts: list[int] = []
    monkeypatch.setattr(module, "merge", counted)
    names = [f"l.{i}" for i in range(6)]
    base = {f"{name}.weight": torch.full((2, 3), float(i)) for i, name in enumerate(names)}
    halves = {FILE_PREFIX + name + end: torch.ones(shape) for name in names for end, shape in _HALVES.items()}
    facts = AdapterFacts(1, {name: f"{name}.weight" for name in names})
    taken = Snapshot(1, _written(halves), _written(base), trains_vision=False, adapter=facts)
    received = _read(*taken.update(full=True, merged=True))
    assert {name: tensor.unique().tolist() for name, tensor in received.items()} == {
        f"{name}.weight": [i + 1.0] for i, name in enumerate(names)
    }
    assert len(counts) == 6
    assert max(counts) <= 2


_HALVES = {LORA_A: (1, 3), LORA_B: (2, 1)}


def _written(tensors: dict[str, torch.Tensor]) -> Buckets:
    return BucketWriter(tensors.items(), 64).write(tensors.items())
