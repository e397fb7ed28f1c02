"""Tensors end to end in a few flat buffers of CPU memory, which is how weights cross the wire."""

import asyncio
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

from common.checksum import checksum
from common.dtypes import DTYPE_NAMES, tensor_in
from common.types import Manifest, ManifestBucket, ManifestParameter

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Buckets:
    """Some tensors, end to end. `buffers[i]` is uint8 on the CPU; `checksums[i]`, its checksum, is there as soon as the
    buffer is filled. They are filled in this order.
    """

    parameters: tuple[ManifestParameter, ...]
    buffers: tuple[torch.Tensor, ...]
    checksums: tuple[Future[int], ...]

    async def filled(self) -> None:
        """Wait until all are. Raises NotFilled."""
        for is_filled in self.checksums:
            await asyncio.wrap_future(is_filled)

    @property
    def num_bytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.numel() for buffer in self.buffers)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors by name, as views on the buffers."""
        for parameter in self.parameters:
            yield parameter.name, tensor_in(self.buffers[parameter.bucket], parameter)


class Update(NamedTuple):
    """What is sent, and for each buffer its checksum, which is there as soon as the buffer is filled.

    Of what is not filled yet the manifest has no checksums. In a delta the checksums are of the results.
    """

    manifest: Manifest
    buffers: tuple[torch.Tensor, ...]
    checksums: tuple[Future[int], ...]


def join(
    parts: Sequence[Buckets], keep: Buckets | None = None
) -> tuple[tuple[ManifestParameter, ...], tuple[ManifestBucket, ...]]:
    """Parameters and buckets of a manifest whose parts follow each other; members keep the bytes of the part `keep`.

    Buckets that are not filled yet have no checksum.
    """
    parameters: list[ManifestParameter] = []
    buckets: list[ManifestBucket] = []
    for part in parts:
        first = len(buckets)
        parameters += [ManifestParameter(p.name, p.dtype, p.shape, p.bucket + first, p.offset) for p in part.parameters]
        buckets += [
            ManifestBucket(buffer.numel(), checksum.result() if checksum.done() else None, keep=part is keep)
            for buffer, checksum in zip(part.buffers, part.checksums, strict=True)
        ]
    return tuple(parameters), tuple(buckets)


class NotFilled(Exception):  # noqa: N818 - says what happened
    """The memory of a bucket was not filled, and never will be."""


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
        self._last_names = {parameter.bucket: parameter.name for parameter in parameters}
        self._sizes = tuple(sizes)
        self._used: list[tuple[weakref.ref[Buckets], tuple[torch.Tensor, ...]]] = []

    def write(
        self,
        tensors: Iterable[tuple[str, torch.Tensor]],
        on_begin: Callable[[Buckets], None] = lambda _buckets: None,
    ) -> Buckets:
        """Copy `tensors`, which are those of the layout in its order. Checksums are made while the next are copied.

        `on_begin` has the buckets before anything is in them.
        """
        buffers = self._free_buffers()
        checksums: tuple[Future[int], ...] = tuple(Future() for _ in buffers)
        for result in checksums:
            result.set_running_or_notify_cancel()  # who waits for it, and gives up, does not cancel it
        buckets = Buckets(self.parameters, buffers, checksums)
        self._used.append((weakref.ref(buckets), buffers))
        on_begin(buckets)
        made = []
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="checksum") as thread:
                for parameter, (name, tensor) in zip(self.parameters, tensors, strict=True):
                    assert name == parameter.name
                    tensor_in(buffers[parameter.bucket], parameter).copy_(tensor)
                    if name == self._last_names[parameter.bucket]:
                        made.append(thread.submit(_fulfil, checksums[parameter.bucket], buffers[parameter.bucket]))
            for each in made:
                each.result()
        except BaseException:
            for result in checksums:
                if not result.done():
                    result.set_exception(NotFilled("the copy of the policy broke off"))
            raise
        return buckets

    def _free_buffers(self) -> tuple[torch.Tensor, ...]:
        for i, (buckets, buffers) in enumerate(self._used):
            if buckets() is None:
                del self._used[i]
                return buffers
        return tuple(torch.zeros(size, dtype=torch.uint8) for size in self._sizes)  # zeros: what is between tensors


def _fulfil(result: Future[int], buffer: torch.Tensor) -> None:
    result.set_result(checksum(buffer))
