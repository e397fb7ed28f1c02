"""A chat in the form that the chat templates of Hugging Face processors take."""

from collections.abc import Sequence
from typing import Any

from common.types import ChatMessage, Modality, TextPart


def template_messages(
    messages: Sequence[ChatMessage], modalities: Sequence[Modality] | None = None
) -> list[dict[str, Any]]:
    """Arguments of `apply_chat_template`: roles and contents, each media item as `{"type": "image"}`, or `"video"`.

    `modalities` are those of the media items; None: all are images.
    """
    return [{"role": message.role, "content": _content(message, modalities)} for message in messages]


def _content(message: ChatMessage, modalities: Sequence[Modality] | None) -> str | list[dict[str, str]]:
    texts = [part.text for part in message.parts if isinstance(part, TextPart)]
    if len(texts) == len(message.parts):
        return "".join(texts)  # templates of text models take a string only, those of vision models both
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": (modalities[part.index] if modalities else Modality.IMAGE).value}
        for part in message.parts
    ]
