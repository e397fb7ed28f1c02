"""The domain types that cross the wire: one rollout request and what comes back.

Plain dataclasses of Python and numpy values. `common.wire` turns them into protobuf and back; nothing else does.
"""

import enum
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from common.tensors import NamedTensor, Tensor

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


class Modality(enum.Enum):
    """What a media item is."""

    IMAGE = "image"
    VIDEO = "video"


class FinishReason(enum.Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text inside a chat message."""

    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    """The place of one media item inside a chat message, as an index into `RolloutRequest.media`."""

    index: int


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat.

    Example: `ChatMessage("user", (MediaPart(0), TextPart("Which digit?")))`.
    """

    role: str
    parts: tuple[TextPart | MediaPart, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages, to be rendered by the model's chat template with the generation prompt added."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text with the model's own placeholder strings in it, one for each media item."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids.

    Without `placeholders`, `ids` hold one placeholder token for each media item. With them, `ids` are expanded and
    `placeholders[i]` is the run that media item i fills.
    """

    ids: tuple[int, ...]
    placeholders: tuple["PlaceholderRange", ...] = ()


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class PlaceholderRange:
    """The run of tokens `[offset, offset + length)` of the expanded prompt that one media item fills."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of a video in order, each an image file of the same width and height."""

    files: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One image or video of a prompt: its sha256 (32 bytes), and its content unless the receiver has that already.

    The content of an image is one of: an encoded file; pixels, `U8 [height, width, 3]`; or what the model's own
    processor yields for it, by name. That of a video: its frames; pixels, `U8 [frames, height, width, 3]`; or processed
    tensors likewise. `common.media` and `common.tensors` have the hashes. `min_pixels` and `max_pixels` bound
    height * width after the processor's resizing; None: the model's own bounds. `frames_per_second` says how far apart
    the frames of a video are.
    """

    sha256: bytes
    encoded: bytes | None = None
    modality: Modality = Modality.IMAGE
    pixels: Tensor | None = None
    processed: tuple[NamedTensor, ...] = ()
    min_pixels: int | None = None
    max_pixels: int | None = None
    frames: Frames | None = None
    frames_per_second: float | None = None

    @property
    def content(self) -> "MediaContent | None":
        """The one content that is here, None for a reference by hash."""
        if self.encoded is not None:
            return self.encoded
        return self.frames or self.pixels or self.processed or None

    def by_hash(self) -> "MediaItem":
        """The same item without its content, for a receiver that has it."""
        return replace(self, encoded=None, pixels=None, processed=(), frames=None)


MediaContent = bytes | Frames | Tensor | tuple[NamedTensor, ...]


class Constraint(enum.Enum):
    """Kinds of structured output."""

    REGEX = "regex"
    JSON_SCHEMA = "json_schema"
    CHOICE = "choice"
    GRAMMAR = "grammar"
    JSON_OBJECT = "json_object"


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What the text of every completion must match; `spec` for all kinds but CHOICE, which has `choices`."""

    constraint: Constraint
    spec: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RepetitionDetection:
    """Ends a completion whose last tokens are one pattern, `min_count` times in a row."""

    max_pattern_size: int
    min_pattern_size: int = 1
    min_count: int = 2


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are sampled. `None` and the defaults mean "off"; `temperature=0` is greedy.

    With `num_beams` nothing is sampled: the `n` best beams of a beam search are returned.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 0
    min_tokens: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    allowed_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    prompt_top_logprobs: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    structured_output: StructuredOutput | None = None
    num_beams: int = 0
    length_penalty: float | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = False
    repetition_detection: RepetitionDetection | None = None


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One group: a prompt with its media and how to sample from it."""

    group_id: str
    prompt: Prompt
    media: tuple[MediaItem, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    min_policy_version: int = 0
    return_text: bool = False
    return_processed: bool = False
    return_routed_experts: bool = False
    model: str = ""
    """An adapter, or the base model, by name; empty: the policy."""


@dataclass(frozen=True, slots=True)
class MediaUse:
    """What the actor did with one media item; the learner holds it against its own processor."""

    sha256: bytes
    placeholder: PlaceholderRange
    num_tokens: int
    grid_thw: tuple[int, ...] = ()
    modality: Modality = Modality.IMAGE
    processed: tuple[NamedTensor, ...] = ()


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The most likely ids at one place and their logprobs, most likely first."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """How the actor understood a prompt. `expanded_ids` are the ids that the model saw.

    `prompt_logprobs[t]` is the model's own logprob of `expanded_ids[t]`, 0 for the first; empty unless asked for.
    """

    group_id: str
    actor_id: str
    unexpanded_ids: IntArray
    expanded_ids: IntArray
    media: tuple[MediaUse, ...] = ()
    suppressed_token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top_logprobs: tuple[TopLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `[start, end)` of a completion were sampled by `policy_version`."""

    policy_version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class BeamScore:
    """How well a beam did: its summed logprob, and that by the length penalty, which ranks beams."""

    cumulative_logprob: float
    score: float


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sample of a group.

    `logprobs[t]` is the natural log of the probability of `token_ids[t]` under the distribution that it was sampled
    from (after temperature, truncation and suppression). `stop` is the stop id or string that ended it, None for the
    end-of-sequence id. With `beam` it is no sample, but what a beam search found. `routed_experts`, on request, are
    `[tokens, layers, experts per token]` for the tokens that the model was given: the prompt and all but the last.
    """

    trajectory_id: str
    index: int
    token_ids: IntArray
    logprobs: FloatArray
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...]
    first_token_s: float = 0.0
    finished_s: float = 0.0
    text: str = ""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    stop: int | str | None = None
    beam: BeamScore | None = None
    routed_experts: Tensor | None = None


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
    """One flat buffer of an update and the checksum of its bytes (`common.checksum`).

    `keep`: for the delta that may follow. In a delta, `delta_bytes` cross the wire, in words of `word_bytes`
    (`common.delta`); `num_bytes` and the checksum are of the result.
    """

    num_bytes: int
    xxh3: int
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

    @property
    def adapter_rank(self) -> int:
        """Largest rank among the adapter's layers; 0 without adapter."""
        return max((p.shape[0] for p in self.parameters if self.adapter and p.name.endswith(LORA_A)), default=0)


# How the parameters of an adapter end, in PEFT's files and in manifests.
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


def is_lora(name: str) -> bool:
    """Whether a parameter of a manifest with an adapter belongs to the adapter."""
    return name.endswith((LORA_A, LORA_B))
