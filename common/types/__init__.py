"""The domain types that cross the wire.

Plain dataclasses of Python and numpy values. `common.wire` turns them into protobuf and back; nothing else does.
"""

from common.types.media import Frames, MediaContent, MediaItem, Modality, PlaceholderRange
from common.types.requests import (
    ChatMessage,
    ChatPrompt,
    MediaPart,
    Prompt,
    RolloutRequest,
    TextPart,
    TextPrompt,
    TokenPrompt,
)
from common.types.responses import (
    BeamScore,
    Completion,
    FinishReason,
    FloatArray,
    IntArray,
    MediaUse,
    PromptInfo,
    TopLogprobs,
    VersionSpan,
)
from common.types.sampling import (
    MAX_STRING_CHARS,
    MAX_STRINGS,
    MAX_TOKEN_IDS,
    Constraint,
    RepetitionDetection,
    SamplingParams,
    StructuredOutput,
)
from common.types.server import ActorState, ActorStatus, ServerInfo, ServerLimits
from common.types.weights import LORA_A, LORA_B, EpochSpec, Manifest, ManifestBucket, ManifestParameter, is_lora

__all__ = [
    "LORA_A",
    "LORA_B",
    "MAX_STRINGS",
    "MAX_STRING_CHARS",
    "MAX_TOKEN_IDS",
    "ActorState",
    "ActorStatus",
    "BeamScore",
    "ChatMessage",
    "ChatPrompt",
    "Completion",
    "Constraint",
    "EpochSpec",
    "FinishReason",
    "FloatArray",
    "Frames",
    "IntArray",
    "Manifest",
    "ManifestBucket",
    "ManifestParameter",
    "MediaContent",
    "MediaItem",
    "MediaPart",
    "MediaUse",
    "Modality",
    "PlaceholderRange",
    "Prompt",
    "PromptInfo",
    "RepetitionDetection",
    "RolloutRequest",
    "SamplingParams",
    "ServerInfo",
    "ServerLimits",
    "StructuredOutput",
    "TextPart",
    "TextPrompt",
    "TokenPrompt",
    "TopLogprobs",
    "VersionSpan",
    "is_lora",
]
