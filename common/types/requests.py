"""What is asked of an actor: a group."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.types.media import MediaItem, PlaceholderRange
from common.types.sampling import SamplingParams


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
    """Messages, to be rendered by the model's chat template with the generation prompt added.

    `template_arguments` are further ones of the template, as JSON has them (`common.chat.template_arguments`).
    """

    messages: tuple[ChatMessage, ...]
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


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
    placeholders: tuple[PlaceholderRange, ...] = ()


Prompt = ChatPrompt | TextPrompt | TokenPrompt


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
    run_id: str = ""
    """The run whose policy is to answer; empty: any."""
