"""A copy of the policy at one version, in flat buckets, ready for the wire.

    FSDP shards --full_tensor(), all ranks together--> rank 0: pages of CPU memory --> Manifest + buckets

The trainer makes it between two steps and goes on; the publisher sends it, and sends it again to whoever joins later.
It has it before it is made: each bucket can go out as soon as it is filled, while the next ones are gathered.
With LoRA what trains is the adapter. Actors that take adapters get it alone; for others it is merged here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from common.types import LORA_A, LORA_B, Manifest
from learner.model.lora import FILE_PREFIX, adapter_parameters, merge, own_name
from learner.model.names import CheckpointForm
from learner.weights.buckets import Buckets, BucketWriter, Update, join


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What trains is a LoRA adapter; `rank` is the largest of its layers, `name` the one under which actors have it.

    `weights` has, for each adapted module, the name of its weight on the wire. `merged_because` says why actors cannot
    apply the adapter; empty if they can.
    """

    rank: int
    weights: Mapping[str, str]
    merged_because: str = ""
    name: str = "policy"

    @classmethod
    def of(cls, matrices: "Sequence[_Source]", in_vision: Sequence[str], form: CheckpointForm) -> "AdapterFacts":
        """From its matrices, and the names of those that an image passes before the text model."""
        first = [source for source in matrices if source.name.endswith(LORA_A)]
        modules = [source.name.removeprefix(FILE_PREFIX).removesuffix(LORA_A) for source in first]
        weights = {module: form.name(f"{module}.weight") for module in modules}
        rank = max(source.parameter.shape[0] for source in first)
        if in_vision:
            return cls(rank, weights, f"vLLM applies no adapter to vision modules, as {in_vision[0]}")
        return cls(rank, weights)


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

    async def gathered(self) -> None:
        """Wait until it is whole. Raises NotFilled if it never will be."""
        await self.trained.filled()

    def update(self, *, full: bool, merged: bool = False, keep: bool = False) -> Update:
        """The update that brings this version. With `merged` or `keep` it must be `gathered`.

        Args:
            full: add what is frozen, for members that have just joined.
            merged: an adapter goes into the model's weights; takes a pass over those in question.
            keep: members keep what trains, for a delta.
        """
        adapter = self.adapter.name if self.adapter is not None and not merged else ""
        if self.adapter is not None and merged:
            parts = [_merged(self.trained, self.frozen, self.adapter.weights, full=full)]
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
        buffers = tuple(buffer for part in parts for buffer in part.buffers)
        return Update(manifest, buffers, tuple(checksum for part in parts for checksum in part.checksums))


class Snapshotter:
    """Takes snapshots of one model. Every rank has one and calls it together with the others; rank 0 gets the copy."""

    def __init__(
        self,
        model: nn.Module,
        vision_parts: Sequence[str],
        *,
        is_sender: bool,
        bucket_bytes: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make it, on every rank.

        Args:
            model: whose parameters are copied.
            vision_parts: modules and parameters that an image passes before the text model, projectors included.
            is_sender: whether this is rank 0.
            bucket_bytes: size at which a buffer is closed.
            dtype: of floating-point parameters in the copy; None: as they are.
        """
        parameters = [(own_name(name), parameter) for name, parameter in model.named_parameters()]
        own = [_Source(name, parameter, dtype=dtype) for name, parameter in parameters if name is not None]
        lora = [_Source(*fields, dtype) for fields in adapter_parameters(model)]
        trained = lora or [source for source in own if source.parameter.requires_grad]
        frozen = own if lora else [source for source in own if not source.parameter.requires_grad]
        in_vision = [
            source.name
            for source in trained
            for part in vision_parts
            if f"{source.name.removeprefix(FILE_PREFIX)}.".startswith(f"{part}.")
        ]
        self._trains_vision = bool(in_vision)
        form = CheckpointForm(model, [source.name for source in own])
        self._adapter = AdapterFacts.of(lora, in_vision, form) if lora else None
        self._trained = _Gatherer(trained, form, bucket_bytes, is_sender=is_sender)
        self._frozen = _Gatherer(frozen, form, bucket_bytes, is_sender=is_sender).gather()

    def take(self, version: int, on_begin: Callable[[Snapshot], None] = lambda _snapshot: None) -> Snapshot | None:
        """A collective; None on all ranks but 0, where `on_begin` has it before anything is gathered."""
        buckets = self._trained.gather(lambda buckets: on_begin(self._snapshot(version, buckets)))
        return self._snapshot(version, buckets) if buckets is not None else None

    def _snapshot(self, version: int, trained: Buckets) -> Snapshot:
        assert self._frozen is not None
        return Snapshot(version, trained, self._frozen, self._trains_vision, self._adapter)


@dataclass(frozen=True, slots=True)
class _Source:
    """A parameter, its name in the model without adapter, and what becomes of it on the way: a factor, a dtype."""

    name: str
    parameter: torch.Tensor
    factor: float = 1.0
    dtype: torch.dtype | None = None

    def sent(self, whole: torch.Tensor) -> torch.Tensor:
        """What is sent for the whole parameter."""
        scaled = whole if self.factor == 1 else whole * self.factor
        return scaled.to(self.dtype) if self.dtype is not None and scaled.is_floating_point() else scaled


class _Gatherer:
    """Copies always the same parameters, whole and as the checkpoint has them, into buckets of rank 0."""

    def __init__(self, sources: Sequence[_Source], form: CheckpointForm, bucket_bytes: int, *, is_sender: bool) -> None:
        self._sources = sources
        self._form = form
        self._writer = BucketWriter(self._layout(), bucket_bytes) if is_sender else None

    def _layout(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is written each time, without memory."""
        for source in self._sources:
            shape, dtype = source.parameter.shape, source.parameter.dtype
            yield from self._form.tensors(source.name, source.sent(torch.empty(shape, dtype=dtype, device="meta")))

    def gather(self, on_begin: Callable[[Buckets], None] = lambda _buckets: None) -> Buckets | None:
        """A collective; None on all ranks but 0."""
        if self._writer is not None:
            return self._writer.write(self._full_tensors(), on_begin)
        for _ in self._full_tensors():
            pass
        return None

    def _full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for source in self._sources:
            whole = _full(source.parameter)
            if self._writer is not None:
                yield from self._form.tensors(source.name, source.sent(whole))


def _full(parameter: torch.Tensor) -> torch.Tensor:
    full_tensor = getattr(parameter, "full_tensor", None)  # a DTensor under FSDP2
    return (full_tensor() if full_tensor is not None else parameter).detach()


def _merged(adapter: Buckets, base: Buckets, weights_of: Mapping[str, str], *, full: bool) -> Buckets:
    """The weights of the base model with the adapter in them; `full`: and all others.

    What lies beside an adapted layer comes along: engines pack such layers together, and can only load them together.
    """
    matrices = dict(adapter.tensors())
    adapted = {weight: module for module, weight in weights_of.items()}
    parents = {_parent(weight) for weight in adapted}

    def chosen() -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor) for name, tensor in base.tensors() if full or _parent(name) in parents)

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in chosen():
            if name in adapted:
                a, b = (matrices[FILE_PREFIX + adapted[name] + ending] for ending in (LORA_A, LORA_B))
                yield name, merge(tensor, a, b, 1.0)
            else:
                yield name, tensor

    # One tensor at a time: all of them would be the model once more.
    return BucketWriter(chosen(), max(buffer.numel() for buffer in base.buffers)).write(merged())


def _parent(name: str) -> str:
    """What the module of a parameter is in."""
    return name.rpartition(".")[0].rpartition(".")[0]
