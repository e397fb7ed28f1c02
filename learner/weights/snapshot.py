"""A copy of the policy at one version, in flat buckets, ready for the wire.

    FSDP shards --full_tensor(), all ranks together--> rank 0: pages of CPU memory --> Manifest + buckets

The trainer makes it between two steps and goes on; the publisher sends it, and sends it again to whoever joins later.
With LoRA what trains is the adapter. Actors that take adapters get it alone; for others it is merged here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from common.types import LORA_A, LORA_B, Manifest
from learner.model.lora import FILE_PREFIX, adapter_parameters, merge, own_name
from learner.weights.buckets import Buckets, BucketWriter, join


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What trains is a LoRA adapter; `rank` is the largest of its layers, `name` the one under which actors have it.

    `merged_because` says why actors cannot apply it; empty if they can.
    """

    rank: int
    merged_because: str = ""
    name: str = "policy"

    @classmethod
    def of(cls, matrices: "Sequence[_Source]", in_vision: Sequence[str]) -> "AdapterFacts":
        """From its matrices, and the names of those that an image passes before the text model."""
        rank = max(source.parameter.shape[0] for source in matrices if source.name.endswith(LORA_A))
        if in_vision:
            return cls(rank, f"vLLM applies no adapter to vision modules, as {in_vision[0]}")
        return cls(rank)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version: what trains, and what is frozen and so the same in every version.

    With an adapter, `trained` is the adapter as manifests have it, and `frozen` is the whole model below it.
    """

    version: int
    trained: Buckets
    frozen: Buckets
    trains_vision: bool
    adapter: AdapterFacts | None = None

    def update(
        self, *, full: bool, merged: bool = False, keep: bool = False
    ) -> tuple[Manifest, tuple[torch.Tensor, ...]]:
        """Manifest and buffers of an update.

        Args:
            full: add what is frozen, for members that have just joined.
            merged: an adapter goes into the model's weights; takes a pass over those in question.
            keep: members keep what trains, for a delta.
        """
        adapter = self.adapter.name if self.adapter is not None and not merged else ""
        if self.adapter is not None and merged:
            parts = [_merged(self.trained, self.frozen, full=full)]
        else:
            parts = [self.frozen, self.trained] if full else [self.trained]
        parameters, buckets = join(parts, keep=self.trained if keep else None)
        manifest = Manifest(
            self.version,
            parameters,
            buckets,
            updates_vision=full or (self.trains_vision and not adapter),
            adapter=adapter,
        )
        return manifest, tuple(buffer for part in parts for buffer in part.buffers)


class Snapshotter:
    """Takes snapshots of one model. Every rank has one and calls it together with the others; rank 0 gets the copy."""

    def __init__(
        self,
        model: nn.Module,
        vision_modules: Sequence[str],
        *,
        is_sender: bool,
        bucket_bytes: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make it, on every rank.

        Args:
            model: whose parameters are copied.
            vision_modules: what an image passes before the text model, projectors included.
            is_sender: whether this is rank 0.
            bucket_bytes: size at which a buffer is closed.
            dtype: of floating-point parameters in the copy; None: as they are.
        """
        parameters = [(own_name(name), parameter) for name, parameter in model.named_parameters()]
        own = [_Source(name, parameter) for name, parameter in parameters if name is not None]
        lora = [_Source(*fields) for fields in adapter_parameters(model)]
        trained = lora or [source for source in own if source.parameter.requires_grad]
        frozen = own if lora else [source for source in own if not source.parameter.requires_grad]
        in_vision = [
            source.name
            for source in trained
            for module in vision_modules
            if source.name.removeprefix(FILE_PREFIX).startswith(f"{module}.")
        ]
        self._trains_vision = bool(in_vision)
        self._adapter = AdapterFacts.of(lora, in_vision) if lora else None
        self._trained = _Gatherer(trained, bucket_bytes, dtype, is_sender=is_sender)
        self._frozen = _Gatherer(frozen, bucket_bytes, dtype, is_sender=is_sender).gather()

    def take(self, version: int) -> Snapshot | None:
        """A collective; None on all ranks but 0."""
        buckets = self._trained.gather()
        if buckets is None or self._frozen is None:
            return None
        return Snapshot(version, buckets, self._frozen, self._trains_vision, self._adapter)


@dataclass(frozen=True, slots=True)
class _Source:
    """A parameter, its name on the wire, and what it is multiplied by on the way."""

    name: str
    parameter: torch.Tensor
    factor: float = 1.0


class _Gatherer:
    """Copies always the same parameters, whole, into buckets of rank 0."""

    def __init__(
        self, sources: Sequence[_Source], bucket_bytes: int, dtype: torch.dtype | None, *, is_sender: bool
    ) -> None:
        self._sources = sources
        layout = [
            (source.name, torch.empty(source.parameter.shape, dtype=_dtype(source.parameter, dtype), device="meta"))
            for source in sources
        ]
        self._writer = BucketWriter(layout, bucket_bytes) if is_sender else None

    def gather(self) -> Buckets | None:
        """A collective; None on all ranks but 0."""
        if self._writer is not None:
            return self._writer.write(self._full_tensors())
        for _ in self._full_tensors():
            pass
        return None

    def _full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for source in self._sources:
            tensor = _full(source.parameter)
            yield source.name, tensor if source.factor == 1 else tensor * source.factor


def _dtype(parameter: torch.Tensor, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and parameter.is_floating_point() else parameter.dtype


def _full(parameter: torch.Tensor) -> torch.Tensor:
    full_tensor = getattr(parameter, "full_tensor", None)  # a DTensor under FSDP2
    return (full_tensor() if full_tensor is not None else parameter).detach()


def _merged(adapter: Buckets, base: Buckets, *, full: bool) -> Buckets:
    """The weights of the base model with the adapter in them; `full`: and all others.

    What lies beside an adapted layer comes along: engines pack such layers together, and can only load them together.
    """
    matrices = dict(adapter.tensors())
    adapted = {name.removeprefix(FILE_PREFIX).removesuffix(LORA_A) for name in matrices if name.endswith(LORA_A)}
    parents = {module.rpartition(".")[0] for module in adapted}

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in base.tensors():
            module = name.rpartition(".")[0]
            if name == f"{module}.weight" and module in adapted:
                a, b = (matrices[FILE_PREFIX + module + ending] for ending in (LORA_A, LORA_B))
                yield name, merge(tensor, a, b, 1.0)
            elif full or module.rpartition(".")[0] in parents:
                yield name, tensor

    tensors = list(weights())
    return BucketWriter(tensors, max(buffer.numel() for buffer in base.buffers)).write(tensors)
