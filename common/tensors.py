"""Tensors as they cross the wire: a dtype, a shape and row-major little-endian bytes.

Plain bytes, so that a type that numpy lacks (bfloat16) passes through unchanged, and nothing is copied until somebody
asks for an array. Whoever makes one from foreign bytes checks it first (`common.wire.tensors`).
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Names as in safetensors files; the sizes in bytes.
ITEM_SIZES = {"BOOL": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_NUMPY_DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}
_NAMES = {np.dtype(code): name for name, code in _NUMPY_DTYPES.items()}
# As the proto file calls them; part of the hash of a tensor.
WIRE_NAMES = {
    "BOOL": "BOOL",
    "U8": "UINT8",
    "I16": "INT16",
    "I32": "INT32",
    "I64": "INT64",
    "F16": "FLOAT16",
    "BF16": "BFLOAT16",
    "F32": "FLOAT32",
    "F64": "FLOAT64",
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A dense tensor; `len(data)` is the product of `shape` times the size of `dtype`.

    Example: `Tensor("F32", (2, 3), bytes(24))`.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> npt.NDArray[np.generic]:
        """A read-only view of the data. Raises ValueError for BF16, which numpy does not know."""
        if self.dtype not in _NUMPY_DTYPES:
            raise ValueError(f"{self.dtype}: numpy has no such type")
        return np.frombuffer(self.data, _NUMPY_DTYPES[self.dtype]).reshape(self.shape)

    def widened(self) -> npt.NDArray[np.generic]:
        """As `array`, with BF16 as the same values in float32."""
        if self.dtype != "BF16":
            return self.array()
        bits = np.frombuffer(self.data, "<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(self.shape)


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """One of a processor's outputs for one media item, as `pixel_values`."""

    name: str
    tensor: Tensor


def tensor_of(array: npt.NDArray[np.generic]) -> Tensor:
    """An array as a tensor. Raises ValueError for a dtype that does not cross the wire."""
    name = _NAMES.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise ValueError(f"arrays of {array.dtype} do not cross the wire")
    return Tensor(name, array.shape, np.ascontiguousarray(array).astype(_NUMPY_DTYPES[name], copy=False).tobytes())


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this dtype and shape, without overflow."""
    return math.prod(shape) * ITEM_SIZES[dtype]


def tensors_hash(tensors: Iterable[NamedTensor]) -> bytes:
    """The 32-byte sha256 that names tensors as a media item; `MediaItem.sha256` in the proto file defines it."""
    digest = hashlib.sha256()
    for named in sorted(tensors, key=lambda named: named.name):
        tensor = named.tensor
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{named.name} {WIRE_NAMES[tensor.dtype]} {shape}\n".encode())
        digest.update(tensor.data)
    return digest.digest()


def pixels_hash(pixels: Tensor) -> bytes:
    """The same for raw pixels."""
    return tensors_hash((NamedTensor("pixels", pixels),))
