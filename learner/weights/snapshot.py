"""A copy of the policy at one version, in flat buckets, ready for the wire.

    FSDP shards --full_tensor(), all ranks together--> rank 0: pages of CPU memory --> Manifest + buckets

The trainer makes it between two steps and goes on; the publisher sends it, and sends it again to whoever joins later.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from common.dtypes import DTYPE_NAMES
from common.types import Manifest, ManifestBucket, ManifestParameter
from learner.model.lora import adapted_weight, merge, own_name
from learner.model.names import CheckpointForm

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Buckets:
    """Some parameters, end to end in flat buffers. `buffers[i]` is uint8 on the CPU, with `checksums[i]` its crc32."""

    parameters: tuple[ManifestParameter, ...]
    buffers: tuple[torch.Tensor, ...]
    checksums: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.numel() for buffer in self.buffers)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version: what trains, and what is frozen and so the same in every version."""

    version: int
    trained: Buckets
    frozen: Buckets
    trains_vision: bool

    def update(self, *, full: bool) -> tuple[Manifest, tuple[torch.Tensor, ...]]:
        """Manifest and buffers of an update; `full` adds what is frozen, for members that have just joined."""
        parts = [self.frozen, self.trained] if full else [self.trained]
        parameters: list[ManifestParameter] = []
        buckets: list[ManifestBucket] = []
        buffers: list[torch.Tensor] = []
        for part in parts:
            first = len(buckets)
            parameters += [
                ManifestParameter(p.name, p.dtype, p.shape, p.bucket + first, p.offset) for p in part.parameters
            ]
            buckets += [
                ManifestBucket(buffer.numel(), checksum)
                for buffer, checksum in zip(part.buffers, part.checksums, strict=True)
            ]
            buffers += part.buffers
        manifest = Manifest(self.version, tuple(parameters), tuple(buckets), updates_vision=full or self.trains_vision)
        return manifest, tuple(buffers)


class Snapshotter:
    """Takes snapshots of one model. Every rank has one and calls it together with the others; rank 0 gets the copy."""

    def __init__(self, model: nn.Module, vision_modules: Sequence[str], *, is_sender: bool, bucket_bytes: int) -> None:
        """Make it, on every rank.

        Args:
            model: whose parameters are copied.
            vision_modules: what an image passes before the text model, projectors included.
            is_sender: whether this is rank 0.
            bucket_bytes: size at which a buffer is closed.
        """
        self._model = model
        self._is_sender = is_sender
        self._bucket_bytes = bucket_bytes
        trained = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad or adapted_weight(model, name) is not None
        ]
        self._trained = frozenset(trained)
        own_names = [own for name, _ in model.named_parameters() if (own := own_name(name)) is not None]
        self._form = CheckpointForm(model, own_names)
        self._trains_vision = any(name.startswith(f"{module}.") for name in trained for module in vision_modules)
        self._frozen = self._gather(trained=False)

    def take(self, version: int) -> Snapshot | None:
        """A collective; None on all ranks but 0."""
        buckets = self._gather(trained=True)
        if buckets is None or self._frozen is None:
            return None
        return Snapshot(version, buckets, self._frozen, self._trains_vision)

    def _gather(self, *, trained: bool) -> Buckets | None:
        builder = _BucketBuilder(self._bucket_bytes)
        for name, tensor in self._full_tensors(trained):
            if self._is_sender:
                builder.add(name, tensor)
        return builder.finish() if self._is_sender else None

    def _full_tensors(self, trained: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """In the form that they have in the checkpoint. An adapter is merged."""
        for name, parameter in self._model.named_parameters():
            own = own_name(name)
            if own is None or (name in self._trained) is not trained:
                continue
            tensor = _full(parameter)
            if (adapted := adapted_weight(self._model, name)) is not None:
                a, b, scaling = adapted
                tensor = merge(tensor, _full(a), _full(b), scaling)
            yield from self._form.tensors(own, tensor)


def _full(parameter: torch.Tensor) -> torch.Tensor:
    full_tensor = getattr(parameter, "full_tensor", None)  # a DTensor under FSDP2
    return (full_tensor() if full_tensor is not None else parameter).detach()


class _BucketBuilder:
    """Lays tensors into buffers, each tensor whole and aligned."""

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._parameters: list[ManifestParameter] = []
        self._buffers: list[torch.Tensor] = []
        self._open: list[torch.Tensor] = []
        self._open_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        if self._open and self._open_bytes + num_bytes > self._bucket_bytes:
            self._close()
        dtype = DTYPE_NAMES.get(tensor.dtype)
        if dtype is None:
            raise ValueError(f"parameter {name} has dtype {tensor.dtype}, which the weight protocol does not carry")
        self._parameters.append(
            ManifestParameter(name, dtype, tuple(tensor.shape), len(self._buffers), self._open_bytes)
        )
        padding = -num_bytes % _ALIGNMENT
        # reshape, then view: a copy of the bytes, whatever the device and the strides
        self._open.append(tensor.to("cpu", copy=True).reshape(-1).view(torch.uint8))
        if padding:
            self._open.append(torch.zeros(padding, dtype=torch.uint8))
        self._open_bytes += num_bytes + padding

    def finish(self) -> Buckets:
        self._close()
        checksums = tuple(zlib.crc32(buffer.numpy().data) for buffer in self._buffers)
        return Buckets(tuple(self._parameters), tuple(self._buffers), checksums)

    def _close(self) -> None:
        if self._open:
            self._buffers.append(torch.cat(self._open))
            self._open, self._open_bytes = [], 0
