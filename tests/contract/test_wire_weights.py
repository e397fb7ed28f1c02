"""The codec of weight updates: golden bytes, round trips, and manifests and epochs that do not add up."""

import dataclasses
import math
from typing import Any

import pytest

from common import wire
from common.errors import InvalidRequest
from common.pb.weights.v1 import weights_pb2
from common.types import (
    ActorState,
    ActorStatus,
    EpochSpec,
    Manifest,
    ManifestBucket,
    ManifestParameter,
)

MANIFEST = Manifest(
    policy_version=9,
    parameters=(
        ManifestParameter("visual.w", "F32", (2, 3), bucket=0, offset=0),
        ManifestParameter("model.b", "BF16", (4,), bucket=0, offset=32),
        ManifestParameter("model.s", "F16", (), bucket=1, offset=16),
    ),
    buckets=(ManifestBucket(40, 0xDEADBEEF), ManifestBucket(18, 1)),
    updates_vision=True,
)

EPOCH = EpochSpec("run", 2, "host", 1234, 3, 1, "gloo", 1.5)


def test_golden_manifest() -> None:
    expected = (
        "08 09"  # 1: policy_version
        "12 13 0a08" + b"visual.w".hex() + "1203 463332 1a02 0203"  # 2: { name, dtype, shape }; bucket 0, offset 0
        "12 14 0a07" + b"model.b".hex() + "1204 42463136 1a01 04 2820"
        "12 12 0a07" + b"model.s".hex() + "1203 463136 2001 2810"
        "1a 0b 0828 19 efbeadde00000000 1a 0b 0812 19 0100000000000000"  # 3: buckets; xxh3 is fixed64, little-endian
        "20 01 2a 04" + b"lora".hex()  # 4, 5
    )  # fmt: skip
    message = wire.manifest_to_proto(dataclasses.replace(MANIFEST, adapter="lora"))
    assert message.SerializeToString(deterministic=True).hex() == expected.replace(" ", "")


def test_weights_round_trip() -> None:
    assert wire.manifest_from_proto(wire.manifest_to_proto(MANIFEST)) == MANIFEST
    for epoch in (EPOCH, dataclasses.replace(EPOCH, backend="nccl")):
        assert wire.epoch_from_proto(wire.epoch_to_proto(epoch)) == epoch
    for state in ActorState:
        status = ActorStatus("a", state, 3, "run", 4, -1, 5, 6, 7)
        assert wire.status_from_proto(wire.status_to_proto(status)) == status


@pytest.mark.parametrize(
    ("index", "field", "value", "path"),
    [
        (0, "name", "", "manifest.parameters[0].name"),
        (1, "dtype", "F8", "manifest.parameters[1].dtype"),
        (0, "shape", [-2, 3], "manifest.parameters[0].shape"),
        (2, "bucket", 2, "manifest.parameters[2].bucket"),
        (1, "offset", 8, "manifest.parameters[1].offset"),  # not aligned
        (1, "offset", 16, "manifest.parameters[1].offset"),  # on top of the one before: 2 * 3 * 4 = 24 bytes
        (1, "shape", [5], "manifest.parameters[1].offset"),  # 32 + 5 * 2 > 40
        (0, "shape", [2**40, 2**40], "manifest.parameters[0].offset"),
        (2, "bucket", 0, "manifest.parameters[2].offset"),  # buckets in order
    ],
)
def test_a_manifest_that_does_not_add_up(index: int, field: str, value: object, path: str) -> None:
    message = wire.manifest_to_proto(MANIFEST)
    parameter = message.parameters[index]
    parameter.ClearField(field)  # type: ignore[arg-type]
    parameter.MergeFrom(weights_pb2.Parameter(**{field: value}))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as raised:
        wire.manifest_from_proto(message)
    assert raised.value.field == path


def test_a_bucket_that_nobody_fills() -> None:
    """Memory is allocated for what the parameters need, whatever the manifest says."""
    buckets = (MANIFEST.buckets[0], ManifestBucket(2**40, 1))
    with pytest.raises(InvalidRequest, match="1099511627776; 18 are filled") as raised:
        wire.manifest_from_proto(wire.manifest_to_proto(dataclasses.replace(MANIFEST, buckets=buckets)))
    assert raised.value.field == "manifest.buckets[1].num_bytes"


def test_a_bucket_that_is_still_gathered_has_no_checksum_yet() -> None:
    buckets = (dataclasses.replace(MANIFEST.buckets[0], xxh3=None), dataclasses.replace(MANIFEST.buckets[1], xxh3=0))
    manifest = dataclasses.replace(MANIFEST, buckets=buckets)
    assert wire.manifest_from_proto(wire.manifest_to_proto(manifest)) == manifest
    assert manifest.wrong_buckets((5, 0)) == []
    assert manifest.wrong_buckets((5, 6)) == [1]
    assert manifest.wrong_buckets((5,)) == [0, 1]


# What leads from version 0 to version 9: the largest delta and the smallest.
DELTA = dataclasses.replace(
    MANIFEST,
    buckets=(
        dataclasses.replace(MANIFEST.buckets[0], delta_bytes=40 + 1024, word_bytes=4),
        dataclasses.replace(MANIFEST.buckets[1], delta_bytes=1, word_bytes=2),
    ),
    base_version=0,
)


@pytest.mark.parametrize("word_bytes", [1, 2, 4, 8])
def test_a_manifest_of_deltas(word_bytes: int) -> None:
    buckets = (dataclasses.replace(DELTA.buckets[0], word_bytes=word_bytes), DELTA.buckets[1])
    manifest = dataclasses.replace(DELTA, buckets=buckets)
    assert wire.manifest_from_proto(wire.manifest_to_proto(manifest)) == manifest


@pytest.mark.parametrize(
    ("index", "values", "field"),
    [
        (0, {"delta_bytes": 0}, "manifest.buckets[0].delta_bytes"),
        (0, {"delta_bytes": 40 + 1025}, "manifest.buckets[0].delta_bytes"),
        (1, {"word_bytes": 0}, "manifest.buckets[1].word_bytes"),
        (0, {"word_bytes": 5}, "manifest.buckets[0].word_bytes"),  # divides 40
        (1, {"word_bytes": 4}, "manifest.buckets[1].word_bytes"),  # does not divide 18
    ],
)
def test_deltas_that_cannot_be(index: int, values: dict[str, int], field: str) -> None:
    buckets = list(DELTA.buckets)
    buckets[index] = dataclasses.replace(buckets[index], **values)
    with pytest.raises(InvalidRequest) as raised:
        wire.manifest_from_proto(wire.manifest_to_proto(dataclasses.replace(DELTA, buckets=tuple(buckets))))
    assert raised.value.field == field


@pytest.mark.parametrize("manifest", [DELTA, MANIFEST])
def test_what_is_kept_and_a_delta_have_checksums(manifest: Manifest) -> None:
    buckets = (manifest.buckets[0], dataclasses.replace(manifest.buckets[1], xxh3=None, keep=manifest is MANIFEST))
    with pytest.raises(InvalidRequest) as raised:
        wire.manifest_from_proto(wire.manifest_to_proto(dataclasses.replace(manifest, buckets=buckets)))
    assert raised.value.field == "manifest.buckets[1].xxh3"


@pytest.mark.parametrize("values", [{"delta_bytes": 1}, {"word_bytes": 2}])
def test_a_delta_from_no_version_is_refused(values: dict[str, int]) -> None:
    buckets = (MANIFEST.buckets[0], dataclasses.replace(MANIFEST.buckets[1], **values))
    with pytest.raises(InvalidRequest, match=r"without manifest\.base_version") as raised:
        wire.manifest_from_proto(wire.manifest_to_proto(dataclasses.replace(MANIFEST, buckets=buckets)))
    assert raised.value.field == "manifest.buckets[1].delta_bytes"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"policy_version": -1}, "manifest.policy_version"),
        ({"base_version": -1}, "manifest.base_version"),
        ({"parameters": []}, "manifest.parameters"),
    ],
)
def test_a_manifest_from_or_to_no_version_or_of_nothing(values: dict[str, Any], field: str) -> None:
    message = wire.manifest_to_proto(DELTA)
    for name, value in values.items():
        message.ClearField(name)  # type: ignore[arg-type]
        message.MergeFrom(weights_pb2.Manifest(**{name: value}))
    with pytest.raises(InvalidRequest) as raised:
        wire.manifest_from_proto(message)
    assert raised.value.field == field


def _adapter(*shapes: tuple[str, tuple[int, ...]]) -> Manifest:
    """A manifest of float32 matrices of one byte count, and so of one bucket each."""
    parameters = tuple(ManifestParameter(name, "F32", shape, i, 0) for i, (name, shape) in enumerate(shapes))
    buckets = tuple(ManifestBucket(4 * math.prod(shape), 1) for _, shape in shapes)
    return Manifest(3, parameters, buckets, updates_vision=False, adapter="lora")


def test_an_adapter_and_the_model_below_it() -> None:
    alone = _adapter(("x.q.lora_A.weight", (2, 8)), ("x.q.lora_B.weight", (4, 2)))
    both = _adapter(("x.q.weight", (4, 8)), *((p.name, p.shape) for p in alone.parameters))
    for manifest in (alone, both):
        assert wire.manifest_from_proto(wire.manifest_to_proto(manifest)) == manifest
        assert manifest.adapter_rank == 2
    assert [manifest.updates_base for manifest in (alone, both, MANIFEST)] == [False, True, True]
    assert MANIFEST.adapter_rank == 0


@pytest.mark.parametrize(
    ("shapes", "field", "message"),
    [
        ([("w", (2, 2))], "manifest.adapter", "no parameter ends in .lora_A.weight"),
        ([("q.lora_A.weight", (2, 8))], "manifest.parameters", r"q: .lora_A.weight has shape \[2, 8\], .* \[\]"),
        (
            [("q.lora_A.weight", (2, 8)), ("q.lora_B.weight", (4, 3))],
            "manifest.parameters",
            r"must be \[rank, inputs\] and \[outputs, rank\]",
        ),
        ([("q.lora_A.weight", (0, 8)), ("q.lora_B.weight", (4, 0))], "manifest.parameters", "must be"),
        ([("q.lora_A.weight", (8,)), ("q.lora_B.weight", (8,))], "manifest.parameters", "must be"),
    ],
)
def test_matrices_that_are_no_adapter(shapes: list[tuple[str, tuple[int, ...]]], field: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as raised:
        wire.manifest_from_proto(wire.manifest_to_proto(_adapter(*shapes)))
    assert raised.value.field == field


@pytest.mark.parametrize("field", ["run_id", "epoch", "master_host", "master_port", "rank", "backend", "timeout_ms"])
def test_an_epoch_with_a_missing_field(field: str) -> None:
    message = wire.epoch_to_proto(EPOCH)
    message.ClearField(field)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as raised:
        wire.epoch_from_proto(message)
    assert raised.value.field == field


def test_an_epoch_with_a_rank_outside_the_world() -> None:
    message = wire.epoch_to_proto(dataclasses.replace(EPOCH, rank=3))
    with pytest.raises(InvalidRequest, match="rank: must be 1 to world_size - 1 = 2"):
        wire.epoch_from_proto(message)


@pytest.mark.parametrize(
    ("field", "largest", "beyond"), [("run_id", "r" * 128, "r" * 129), ("master_port", 65535, 65536)]
)
def test_an_epoch_at_its_limits(field: str, largest: Any, beyond: Any) -> None:
    epoch = dataclasses.replace(EPOCH, **{field: largest})
    assert wire.epoch_from_proto(wire.epoch_to_proto(epoch)) == epoch
    with pytest.raises(InvalidRequest) as raised:
        wire.epoch_from_proto(wire.epoch_to_proto(dataclasses.replace(EPOCH, **{field: beyond})))
    assert raised.value.field == field
