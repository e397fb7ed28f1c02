"""The seam between the gRPC service and whatever generates: vLLM (`engine_vllm`) or the fake one (`engine_fake`).

An engine knows nothing of gRPC, of the learner or of actor states. It turns one validated request into a stream of
events, and takes weights in the three moves of the protocol: stage, commit, abort.
"""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.tensors import NamedTensor
from common.types import Completion, EpochSpec, Manifest, Modality, Prompt, PromptInfo, SamplingParams

# Of shape `[frames, height, width, 3]`.
VideoArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class EngineMedia:
    """One media item, decoded: an RGB image, a video, or what the model's processor made of one elsewhere.

    `sha256` names it in every cache of the engine, together with the bounds on its pixels and the pace of its frames.
    """

    sha256: bytes
    content: Image.Image | VideoArray | tuple[NamedTensor, ...]
    min_pixels: int | None = None
    max_pixels: int | None = None
    modality: Modality = Modality.IMAGE
    frames_per_second: float | None = None

    @property
    def is_plain(self) -> bool:
        """An image or video that the processor sees with the model's own options."""
        return not isinstance(self.content, tuple) and self.min_pixels is None and self.max_pixels is None

    @property
    def name(self) -> str:
        """What it is called in the caches of the engine; two paces of the same frames are two things there."""
        pace = "" if self.frames_per_second is None else f"@{self.frames_per_second!r}"
        return self.sha256.hex() + pace


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One group, with its media decoded."""

    group_id: str
    prompt: Prompt
    media: tuple[EngineMedia, ...]
    sampling: SamplingParams
    return_text: bool = False
    return_processed: bool = False
    return_routed_experts: bool = False
    model: str = ""
    """An adapter, or the base model, by name; empty: the policy."""
    max_message_bytes: int = 2**31 - 1
    """What is answered has to fit messages of this size: that of the prompt, and that of each completion."""
    call_id: str = field(default_factory=lambda: secrets.token_hex(4))
    accepted_at: float = field(default_factory=time.monotonic)
    """On the monotonic clock: what the times of its completions count from."""

    def trajectory_id(self, index: int, actor_id: str) -> str:
        """The name of a completion; another one when the same group is asked for again."""
        return f"{self.group_id}/{index}/{self.call_id}/{actor_id}"


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine is, known once it has started."""

    name: str
    version: str
    architecture: str
    max_context_tokens: int
    vocab_size: int
    num_workers: int
    suppressed_token_ids: tuple[int, ...]
    takes_videos: bool = True
    max_lora_rank: int = 0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Completions that run and that wait, and the cache of keys and values: its share in use, and what had to leave."""

    num_running: int
    num_waiting: int
    cache_usage: float = 0.0
    num_preemptions: int = 0


class Engine(Protocol):
    """A multimodal generation engine. All coroutines belong to one event loop, unless it says otherwise."""

    async def start(self) -> EngineInfo:
        """Load the model and warm up; on return the engine answers at full speed."""
        ...

    def generate(self, request: EngineRequest) -> AsyncIterator[PromptInfo | list[Completion]]:
        """Sample one group: first its `PromptInfo`, then completions as they finish.

        Closing the iterator aborts what is left. Raises `common.errors.InvalidRequest` for a prompt that the model
        cannot take and for a model that is not here, `common.errors.TooLarge` for more logprobs of the prompt than it
        gives, and `common.errors.EngineDead` when the engine has died.
        """
        ...

    async def open_epoch(self, spec: EpochSpec) -> None:
        """Join a broadcast group with every worker; leaves the previous one first.

        Raises `common.errors.StageTimeout`, and `common.errors.RendezvousUnreachable`.
        """
        ...

    async def stage(self, manifest: Manifest, timeout_s: float) -> tuple[int, ...]:
        """Receive one update into staging memory while generation goes on; the checksum of each bucket received.

        Raises `common.errors.StageTimeout` (`StageBlocked`, where the next member is to blame), and
        `common.errors.InvalidRequest` for an adapter that does not fit. The live weights are untouched in every case.
        """
        ...

    async def commit(self, policy_version: int) -> float:
        """Make the staged update live; seconds that generation stood still."""
        ...

    async def pause(self) -> None:
        """Generation stands still, through commits too, until `resume`; running requests are kept. Idempotent."""
        ...

    async def resume(self) -> None:
        """Generation goes on."""
        ...

    async def abort_epoch(self) -> None:
        """Drop what is staged and leave the group; never raises for having nothing to leave."""
        ...

    def adapters(self) -> tuple[str, ...]:
        """Adapters that requests may name."""
        ...

    def load(self) -> EngineLoad:
        """How busy the engine is."""
        ...

    async def check(self) -> None:
        """Raise `common.errors.EngineDead` if the engine cannot generate any more."""
        ...

    async def stop(self) -> None:
        """Release everything; no process of the engine is left."""
        ...
