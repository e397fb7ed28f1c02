"""What the learner asks of an actor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.types import ActorStatus, Completion, EpochSpec, Manifest, PromptInfo, RolloutRequest, ServerInfo


def ignore() -> None:
    """Nobody asked for progress."""


@dataclass(frozen=True, slots=True)
class SampledGroup:
    """The whole answer to one request: `completions` are all `n` of them, sorted by index."""

    prompt: PromptInfo
    completions: tuple[Completion, ...]


class ActorClient(Protocol):
    """`GrpcClient` is the real one."""

    address: str

    async def generate(
        self, request: RolloutRequest, *, timeout_s: float, on_progress: Callable[[], None] = ignore
    ) -> SampledGroup:
        """Sample a group, all or nothing. `request.media` carry their bytes; only what the actor lacks is sent.

        `on_progress` is called whenever something of it has come.
        """
        ...

    async def status(self, *, timeout_s: float = 5.0) -> ActorStatus:
        """Who the actor is, and its state."""
        ...

    async def server_info(self, *, timeout_s: float = 5.0) -> ServerInfo:
        """The actor's model and limits."""
        ...

    async def open_epoch(self, spec: EpochSpec) -> None:
        """Have the actor join a broadcast group; returns when it is in."""
        ...

    async def stage(self, run_id: str, epoch: int, manifest: Manifest, *, timeout_s: float) -> tuple[int, ...]:
        """Have the actor receive one update; the checksum of each bucket received."""
        ...

    async def commit(self, run_id: str, epoch: int, policy_version: int, *, timeout_s: float) -> float:
        """Make the staged version live; seconds that generation stood still."""
        ...

    async def abort(self, run_id: str, epoch: int, *, timeout_s: float = 5.0) -> None:
        """Have the actor drop what is staged and leave the epoch."""
        ...

    def holds(self, media: Sequence[bytes]) -> bool:
        """Whether the actor is believed to have all media of these sha256."""
        ...

    def forget_media(self) -> None:
        """Another process answers at this address now: it holds none of the media that were sent."""
        ...

    async def close(self) -> None:
        """Close the connection; calls under way fail."""
        ...
