"""`Tensor` and `NamedTensor`: everything about them is checked before a byte is used."""

from collections.abc import Iterable

from common.errors import InvalidRequest
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.tensors import WIRE_NAMES, NamedTensor, Tensor, num_bytes

_MAX_DIMENSIONS = 8
_MAX_TENSORS = 64
_MAX_NAME_CHARS = 128
# Arrays are indexed with signed 64-bit numbers, also those without elements.
_MAX_BYTES = 2**63 - 1
_DTYPE = {name: pb.Dtype.Value(f"DTYPE_{wire_name}") for name, wire_name in WIRE_NAMES.items()}
_DTYPE_BACK = {number: name for name, number in _DTYPE.items()}


def tensor_to_proto(tensor: Tensor) -> pb.Tensor:
    """`Tensor` as a message."""
    return pb.Tensor(dtype=_DTYPE[tensor.dtype], shape=tensor.shape, data=tensor.data)


def tensor_from_proto(message: pb.Tensor, field: str) -> Tensor:
    """Raises InvalidRequest, naming the field, unless dtype, shape and bytes add up."""
    dtype = _DTYPE_BACK.get(message.dtype)
    if dtype is None:
        raise InvalidRequest(f"{field}.dtype", f"{message.dtype} is no dtype")
    shape = tuple(message.shape)
    if len(shape) > _MAX_DIMENSIONS:
        raise InvalidRequest(f"{field}.shape", f"{len(shape)} dimensions; the limit is {_MAX_DIMENSIONS}")
    if any(size < 0 for size in shape):
        raise InvalidRequest(f"{field}.shape", "has a negative size")
    expected = num_bytes(dtype, shape)
    if len(message.data) != expected:
        raise InvalidRequest(f"{field}.data", f"{len(message.data)} bytes; dtype and shape make {expected}")
    if num_bytes(dtype, tuple(size for size in shape if size)) > _MAX_BYTES:
        raise InvalidRequest(f"{field}.shape", "has a size of 0 and others that no memory holds")
    if dtype == "BOOL" and message.data.translate(None, b"\0\1"):
        raise InvalidRequest(f"{field}.data", "has a bool that is neither 0 nor 1")
    return Tensor(dtype, shape, message.data)


def named_tensors_to_proto(tensors: Iterable[NamedTensor]) -> list[pb.NamedTensor]:
    """The same with names."""
    return [pb.NamedTensor(name=named.name, tensor=tensor_to_proto(named.tensor)) for named in tensors]


def named_tensors_from_proto(messages: Iterable[pb.NamedTensor], field: str) -> tuple[NamedTensor, ...]:
    """Raises InvalidRequest as `tensor_from_proto`, and for names that are missing, odd or given twice."""
    tensors: list[NamedTensor] = []
    names: set[str] = set()
    for i, message in enumerate(messages):
        path = f"{field}[{i}]"
        if i >= _MAX_TENSORS:
            raise InvalidRequest(field, f"more than {_MAX_TENSORS} tensors")
        if not (message.name.isascii() and message.name.isidentifier() and len(message.name) <= _MAX_NAME_CHARS):
            raise InvalidRequest(f"{path}.name", f"must be an identifier of at most {_MAX_NAME_CHARS} characters")
        if message.name in names:
            raise InvalidRequest(f"{path}.name", f"{message.name} comes twice")
        names.add(message.name)
        tensors.append(NamedTensor(message.name, tensor_from_proto(message.tensor, f"{path}.tensor")))
    return tuple(tensors)
