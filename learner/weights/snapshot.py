"""A copy of the policy at one version, in flat buckets, ready for the wire.

    FSDP shards --full_tensor(), all ranks together--> rank 0: pages of CPU memory --> Manifest + buckets

The trainer makes it between two steps and goes on; the publisher sends it, and sends it again to whoever joins later.
With LoRA what trains is the adapter. Actors that take adapters get it alone; for others it is merged here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from common.types import LORA_A, LORA_B, Manifest
from learner.model.lora import FILE_PREFIX, adapter_parameters, merge, own_name
from learner.model.names import CheckpointForm
from learner.weights.buckets import Buckets, BucketWriter, join


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What trains is a LoRA adapter; `rank` is the largest of its layers, `name` the one under which actors have it.

    `merged_because` says why actors cannot apply it; empty if they can.
    """

    rank: int
    merged_because: str = ""
    name: str = "policy"
    modules: Mapping[str, str] = field(default_factory=dict)
    """The adapted modules, by the name that their weight has in the checkpoint."""

    @classmethod
    def of(cls, matrices: "Sequence[_Source]", in_vision: Sequence[str], base: "Sequence[_Source]") -> "AdapterFacts":
        """From its matrices, the names of those that an image passes before the text model, and the model below."""
        a = [source for source in matrices if source.name.endswith(LORA_A)]
        adapted = {source.name.removeprefix(FILE_PREFIX).removesuffix(LORA_A) for source in a}
        modules: dict[str, str] = {}
        for source in base:
            module = source.name.removesuffix(".weight")
            if module in adapted:
                [(name, _)] = source.tensors(torch.empty(source.parameter.shape, device="meta"))
                modules[name] = module
        rank = max(source.parameter.shape[0] for source in a)
        because = f"vLLM applies no adapter to vision modules, as {in_vision[0]}" if in_vision else ""
        return cls(rank, because, modules=modules)


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
            parts = [_merged(self.trained, self.frozen, self.adapter.modules, full=full)]
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
        form = CheckpointForm(model, [name for name, _ in parameters if name is not None])
        own = [_Source(name, parameter, form=form) for name, parameter in parameters if name is not None]
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
        self._adapter = AdapterFacts.of(lora, in_vision, own) if lora else None
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
    """A parameter, what it is multiplied by on the way, and in what form it goes; None: as it is."""

    name: str
    parameter: torch.Tensor
    factor: float = 1.0
    form: CheckpointForm | None = None

    def tensors(self, whole: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """What goes on the wire for the whole parameter, by name."""
        tensor = whole if self.factor == 1 else whole * self.factor
        if self.form is None:
            yield self.name, tensor
        else:
            yield from self.form.tensors(self.name, tensor)


class _Gatherer:
    """Copies always the same parameters, whole, into buckets of rank 0."""

    def __init__(
        self, sources: Sequence[_Source], bucket_bytes: int, dtype: torch.dtype | None, *, is_sender: bool
    ) -> None:
        self._sources = sources
        self._dtype = dtype
        self._writer = BucketWriter(bucket_bytes) if is_sender else None

    def gather(self) -> Buckets | None:
        """A collective; None on all ranks but 0."""
        if self._writer is not None:
            return self._writer.write(self._full_tensors())
        for _ in self._full_tensors():
            pass
        return None

    def _full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for source in self._sources:
            whole = _full(source.parameter)
            if self._writer is not None:
                for name, tensor in source.tensors(whole):
                    is_cast = self._dtype is not None and tensor.is_floating_point()
                    yield name, tensor.to(self._dtype) if is_cast else tensor


def _full(parameter: torch.Tensor) -> torch.Tensor:
    full_tensor = getattr(parameter, "full_tensor", None)  # a DTensor under FSDP2
    return (full_tensor() if full_tensor is not None else parameter).detach()


def _merged(adapter: Buckets, base: Buckets, modules: Mapping[str, str], *, full: bool) -> Buckets:
    """The weights of the base model with the adapter in them; `full`: and all others.

    What lies beside an adapted layer comes along: engines pack such layers together, and can only load them together.
    """
    matrices = dict(adapter.tensors())
    parents = {_parent(name) for name in modules}

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in base.tensors():
            if name in modules:
                a, b = (matrices[FILE_PREFIX + modules[name] + ending] for ending in (LORA_A, LORA_B))
                yield name, merge(tensor, a, b, 1.0)
            elif full or _parent(name) in parents:
                yield name, tensor

    return BucketWriter(max(buffer.numel() for buffer in base.buffers)).write(weights())


def _parent(name: str) -> str:
    """Of the module that a parameter belongs to."""
    return name.rpartition(".")[0].rpartition(".")[0]
