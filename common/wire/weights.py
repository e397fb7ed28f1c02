"""Epochs and manifests of `weights.v1`."""

import math
from dataclasses import asdict

from common.errors import InvalidRequest
from common.pb.weights.v1 import weights_pb2 as pb
from common.tensors import ITEM_SIZES
from common.types import LORA_A, LORA_B, EpochSpec, Manifest, ManifestBucket, ManifestParameter

_BACKEND = {"gloo": pb.BACKEND_GLOO, "nccl": pb.BACKEND_NCCL}
_BACKEND_BACK = {number: backend for backend, number in _BACKEND.items()}
# Bytes of one element, by safetensors dtype.
_DTYPE_BYTES = ITEM_SIZES | {"I8": 1}
ALIGNMENT = 16
_MAX_NAME_CHARS = 128
_WORD_BYTES = (1, 2, 4, 8)
_DELTA_OVERHEAD_BYTES = 1024


def epoch_to_proto(spec: EpochSpec) -> pb.OpenEpochRequest:
    """Raises KeyError for a backend that is neither gloo nor nccl."""
    return pb.OpenEpochRequest(
        run_id=spec.run_id,
        epoch=spec.epoch,
        master_host=spec.master_host,
        master_port=spec.master_port,
        world_size=spec.world_size,
        rank=spec.rank,
        backend=_BACKEND[spec.backend],
        timeout_ms=max(1, round(spec.timeout_s * 1e3)),
    )


def epoch_from_proto(message: pb.OpenEpochRequest) -> EpochSpec:
    """Raises InvalidRequest, naming the field."""
    if not 1 <= len(message.run_id) <= 128:
        raise InvalidRequest("run_id", "must have 1 to 128 characters")
    if message.epoch < 1:
        raise InvalidRequest("epoch", "must be 1 or more")
    if not message.master_host:
        raise InvalidRequest("master_host", "is empty")
    if not 1 <= message.master_port <= 65535:
        raise InvalidRequest("master_port", "must be 1 to 65535")
    if not 1 <= message.rank < message.world_size:
        raise InvalidRequest("rank", f"must be 1 to world_size - 1 = {message.world_size - 1}")
    if message.backend not in _BACKEND_BACK:
        raise InvalidRequest("backend", "must be BACKEND_GLOO or BACKEND_NCCL")
    if not message.timeout_ms:
        raise InvalidRequest("timeout_ms", "must be positive")
    return EpochSpec(
        run_id=message.run_id,
        epoch=message.epoch,
        master_host=message.master_host,
        master_port=message.master_port,
        world_size=message.world_size,
        rank=message.rank,
        backend=_BACKEND_BACK[message.backend],
        timeout_s=message.timeout_ms / 1e3,
    )


def manifest_to_proto(manifest: Manifest) -> pb.Manifest:
    """`Manifest` as a message."""
    return pb.Manifest(
        policy_version=manifest.policy_version,
        parameters=[
            pb.Parameter(name=item.name, dtype=item.dtype, shape=item.shape, bucket=item.bucket, offset=item.offset)
            for item in manifest.parameters
        ],
        buckets=[pb.Bucket(**asdict(bucket)) for bucket in manifest.buckets],
        updates_vision=manifest.updates_vision,
        adapter=manifest.adapter,
        base_version=manifest.base_version if manifest.base_version >= 0 else None,
    )


def manifest_from_proto(message: pb.Manifest) -> Manifest:
    """Raises InvalidRequest unless every parameter lies inside its bucket, aligned, after the one before it.

    The matrices of an adapter must come in pairs that fit together.
    """
    if message.policy_version < 0:
        raise InvalidRequest("manifest.policy_version", "must not be negative")
    if not message.parameters:
        raise InvalidRequest("manifest.parameters", "is empty")
    is_delta = message.HasField("base_version")
    buckets = tuple(_bucket(bucket, f"manifest.buckets[{i}]", is_delta) for i, bucket in enumerate(message.buckets))
    parameters = []
    position = (0, 0)
    ends = [0] * len(buckets)
    for i, parameter in enumerate(message.parameters):
        field = f"manifest.parameters[{i}]"
        end = _end(parameter, field, buckets)
        if (parameter.bucket, parameter.offset) < position:
            raise InvalidRequest(f"{field}.offset", "lies before the end of the parameter before it")
        position = (parameter.bucket, end)
        shape = tuple(parameter.shape)
        parameters.append(ManifestParameter(parameter.name, parameter.dtype, shape, parameter.bucket, parameter.offset))
        ends[parameter.bucket] = end
    for i, (bucket, end) in enumerate(zip(buckets, ends, strict=True)):
        # Nobody allocates more than the parameters fill.
        if not end <= bucket.num_bytes < end + ALIGNMENT:
            raise InvalidRequest(f"manifest.buckets[{i}].num_bytes", f"is {bucket.num_bytes}; {end} are filled")
    if message.adapter:
        _check_adapter(message.adapter, parameters)
    if is_delta and message.base_version < 0:
        raise InvalidRequest("manifest.base_version", "must not be negative")
    base_version = message.base_version if is_delta else -1
    return Manifest(
        message.policy_version, tuple(parameters), buckets, message.updates_vision, message.adapter, base_version
    )


def _bucket(message: pb.Bucket, field: str, is_delta: bool) -> ManifestBucket:
    xxh3 = message.xxh3 if message.HasField("xxh3") else None
    bucket = ManifestBucket(message.num_bytes, xxh3, message.keep, message.delta_bytes, message.word_bytes)
    if xxh3 is None and (is_delta or bucket.keep):
        raise InvalidRequest(f"{field}.xxh3", "is missing; a delta and what is kept for one need it")
    if not is_delta:
        if bucket.delta_bytes or bucket.word_bytes:
            raise InvalidRequest(f"{field}.delta_bytes", "has no effect without manifest.base_version")
        return bucket
    if not 1 <= bucket.delta_bytes <= bucket.num_bytes + _DELTA_OVERHEAD_BYTES:
        raise InvalidRequest(
            f"{field}.delta_bytes", f"is {bucket.delta_bytes} for a bucket of {bucket.num_bytes} bytes"
        )
    if bucket.word_bytes not in _WORD_BYTES or bucket.num_bytes % bucket.word_bytes:
        raise InvalidRequest(
            f"{field}.word_bytes", f"is {bucket.word_bytes}; must be 1, 2, 4 or 8, and divide num_bytes"
        )
    return bucket


def _check_adapter(name: str, parameters: list[ManifestParameter]) -> None:
    if len(name) > _MAX_NAME_CHARS:
        raise InvalidRequest("manifest.adapter", f"has more than {_MAX_NAME_CHARS} characters")
    shapes = {parameter.name: parameter.shape for parameter in parameters}
    a = {name.removesuffix(LORA_A): shape for name, shape in shapes.items() if name.endswith(LORA_A)}
    b = {name.removesuffix(LORA_B): shape for name, shape in shapes.items() if name.endswith(LORA_B)}
    if not a:
        raise InvalidRequest("manifest.adapter", f"no parameter ends in {LORA_A}")
    for module in a.keys() | b.keys():
        shape_a, shape_b = a.get(module, ()), b.get(module, ())
        if not (len(shape_a) == len(shape_b) == 2 and shape_a[0] == shape_b[1] > 0):
            raise InvalidRequest(
                "manifest.parameters",
                f"{module}: {LORA_A} has shape {list(shape_a)}, {LORA_B} {list(shape_b)}; "
                "must be [rank, inputs] and [outputs, rank]",
            )


def _end(parameter: pb.Parameter, field: str, buckets: tuple[ManifestBucket, ...]) -> int:
    """Where the parameter ends in its bucket."""
    if not parameter.name:
        raise InvalidRequest(f"{field}.name", "is empty")
    if parameter.dtype not in _DTYPE_BYTES:
        raise InvalidRequest(f"{field}.dtype", f"{parameter.dtype!r} is none of {', '.join(_DTYPE_BYTES)}")
    if any(size < 0 for size in parameter.shape):
        raise InvalidRequest(f"{field}.shape", "has a negative size")
    if parameter.bucket >= len(buckets):
        raise InvalidRequest(f"{field}.bucket", f"{parameter.bucket} of {len(buckets)} buckets")
    if parameter.offset % ALIGNMENT:
        raise InvalidRequest(f"{field}.offset", f"must be a multiple of {ALIGNMENT}")
    end = parameter.offset + math.prod(parameter.shape) * _DTYPE_BYTES[parameter.dtype]
    if end > buckets[parameter.bucket].num_bytes:
        raise InvalidRequest(f"{field}.offset", f"ends at byte {end}, after the end of bucket {parameter.bucket}")
    return end
