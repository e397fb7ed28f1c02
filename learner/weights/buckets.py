"""Tensors end to end in a few flat buffers of CPU memory, which is how weights cross the wire."""

import concurrent.futures
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from common.checksum import checksum
from common.dtypes import DTYPE_NAMES, tensor_in
from common.types import ManifestBucket, ManifestParameter

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Buckets:
    """Some tensors, end to end. `buffers[i]` is uint8 on the CPU, with `checksums[i]` its checksum."""

    parameters: tuple[ManifestParameter, ...]
    buffers: tuple[torch.Tensor, ...]
    checksums: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.numel() for buffer in self.buffers)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors by name, as views on the buffers."""
        for parameter in self.parameters:
            yield parameter.name, tensor_in(self.buffers[parameter.bucket], parameter)


def join(
    parts: Sequence[Buckets], keep: Buckets | None = None
) -> tuple[tuple[ManifestParameter, ...], tuple[ManifestBucket, ...]]:
    """Parameters and buckets of a manifest whose parts follow each other; members keep the bytes of the part `keep`."""
    parameters: list[ManifestParameter] = []
    buckets: list[ManifestBucket] = []
    for part in parts:
        first = len(buckets)
        parameters += [ManifestParameter(p.name, p.dtype, p.shape, p.bucket + first, p.offset) for p in part.parameters]
        buckets += [
            ManifestBucket(buffer.numel(), checksum, keep=part is keep)
            for buffer, checksum in zip(part.buffers, part.checksums, strict=True)
        ]
    return tuple(parameters), tuple(buckets)


class BucketWriter:
    """Copies tensors of always the same names, dtypes and shapes into buckets.

    The memory of buckets that nobody holds any more is used again: touching new memory costs more than the copy.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> None:
        """Lay them out in this order, each whole and aligned; a buffer is closed at `bucket_bytes`.

        Raises:
            ValueError: the protocol has no name for a dtype.
        """
        parameters: list[ManifestParameter] = []
        sizes: list[int] = []
        for name, tensor in tensors:
            dtype = DTYPE_NAMES.get(tensor.dtype)
            if dtype is None:
                raise ValueError(f"parameter {name} has dtype {tensor.dtype}, which the weight protocol does not carry")
            num_bytes = tensor.numel() * tensor.element_size()
            if not sizes or sizes[-1] + num_bytes > bucket_bytes:
                sizes.append(0)
            parameters.append(ManifestParameter(name, dtype, tuple(tensor.shape), len(sizes) - 1, sizes[-1]))
            sizes[-1] += num_bytes + -num_bytes % _ALIGNMENT
        self.parameters = tuple(parameters)
        self._sizes = tuple(sizes)
        self._used: list[tuple[weakref.ref[Buckets], tuple[torch.Tensor, ...]]] = []

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Buckets:
        """Copy `tensors`, which are those of the layout in its order. Checksums are made while the next are copied."""
        buffers = self._free_buffers()
        checksums: list[concurrent.futures.Future[int]] = []
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checksum") as thread:
            for parameter, (name, tensor) in zip(self.parameters, tensors, strict=True):
                assert name == parameter.name
                while len(checksums) < parameter.bucket:
                    checksums.append(thread.submit(checksum, buffers[len(checksums)]))
                tensor_in(buffers[parameter.bucket], parameter).copy_(tensor)
            checksums += [thread.submit(checksum, buffer) for buffer in buffers[len(checksums) :]]
            buckets = Buckets(self.parameters, buffers, tuple(result.result() for result in checksums))
        self._used.append((weakref.ref(buckets), buffers))
        return buckets

    def _free_buffers(self) -> tuple[torch.Tensor, ...]:
        for i, (buckets, buffers) in enumerate(self._used):
            if buckets() is None:
                del self._used[i]
                return buffers
        return tuple(torch.zeros(size, dtype=torch.uint8) for size in self._sizes)  # zeros: what is between tensors
