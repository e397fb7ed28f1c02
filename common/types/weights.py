"""What the learner and an actor say to each other about a weight update."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EpochSpec:
    """One broadcast group as seen by one member. `rank` is that of the actor's first worker; the learner is rank 0."""

    run_id: str
    epoch: int
    master_host: str
    master_port: int
    world_size: int
    rank: int
    backend: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class ManifestParameter:
    """One tensor of an update: Hugging Face name, safetensors dtype ("F32"), where it lies in the buckets."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int


@dataclass(frozen=True, slots=True)
class ManifestBucket:
    """One flat buffer of an update and the checksum of its bytes (`common.checksum`), if it is known already.

    `keep`: for the delta that may follow. In a delta, `delta_bytes` cross the wire, in words of `word_bytes`
    (`common.delta`); `num_bytes` and the checksum are of the result.
    """

    num_bytes: int
    xxh3: int | None
    keep: bool = False
    delta_bytes: int = 0
    word_bytes: int = 0

    @property
    def wire_bytes(self) -> int:
        """What crosses the wire for it."""
        return self.delta_bytes or self.num_bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one weight update sends, in order: model weights, an adapter of the name `adapter`, or both."""

    policy_version: int
    parameters: tuple[ManifestParameter, ...]
    buckets: tuple[ManifestBucket, ...]
    updates_vision: bool
    adapter: str = ""
    base_version: int = -1
    """Of a delta: the version from which it leads here; -1 for none."""

    @property
    def updates_base(self) -> bool:
        """Whether model weights are among the parameters."""
        return not self.adapter or any(not is_lora(parameter.name) for parameter in self.parameters)

    def wrong_buckets(self, checksums: Sequence[int]) -> list[int]:
        """Which buckets were not received as they were sent, as far as the manifest knows."""
        if len(checksums) != len(self.buckets):
            return list(range(len(self.buckets)))
        pairs = zip(checksums, self.buckets, strict=True)
        return [i for i, (received, bucket) in enumerate(pairs) if bucket.xxh3 not in (None, received)]

    @property
    def adapter_rank(self) -> int:
        """Largest rank among the adapter's layers; 0 without adapter."""
        return max((p.shape[0] for p in self.parameters if self.adapter and p.name.endswith(LORA_A)), default=0)


# How the parameters of an adapter end, in PEFT's files and in manifests.
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


def is_lora(name: str) -> bool:
    """Whether a parameter of a manifest with an adapter belongs to the adapter."""
    return name.endswith((LORA_A, LORA_B))
