"""What an actor says of itself."""

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one actor accepts; each is named in the error that it causes."""

    max_group_size: int = 256
    max_context_tokens: int = 4096
    max_media_items: int = 16
    max_media_bytes: int = 32 * 2**20
    max_media_pixels: int = 16 * 2**20
    max_message_bytes: int = 64 * 2**20
    max_queued_completions: int = 4096
    max_logprobs: int = 64
    max_videos: int = 0
    max_video_frames: int = 64


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What an actor is."""

    actor_id: str
    model: str
    architecture: str
    engine: str
    engine_version: str
    server_version: str
    policy_version: int
    limits: ServerLimits
    suppressed_token_ids: tuple[int, ...] = ()
    adapters: tuple[str, ...] = ()


class ActorState(enum.Enum):
    """Life of an actor; only SERVING takes rollouts."""

    LOADING = "loading"
    PENDING_WEIGHTS = "pending_weights"
    SERVING = "serving"
    PAUSED = "paused"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ActorStatus:
    """What an actor reports to the learner. `staged_version` is -1 for none, `run_id` empty for none.

    `max_lora_rank` is the largest rank of an adapter that it takes, 0 if it takes none.
    """

    actor_id: str
    state: ActorState
    policy_version: int
    run_id: str
    epoch: int
    staged_version: int
    num_running: int
    num_waiting: int
    num_workers: int
    max_lora_rank: int = 0
