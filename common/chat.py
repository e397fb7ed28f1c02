"""A chat in the form that the chat templates of Hugging Face processors take."""

from collections.abc import Sequence
from typing import Any

from common.types import ChatMessage, TextPart


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Arguments of `apply_chat_template`: roles and contents, each media item as `{"type": "image"}`."""
    return [{"role": message.role, "content": _content(message)} for message in messages]


def _content(message: ChatMessage) -> str | list[dict[str, str]]:
    texts = [part.text for part in message.parts if isinstance(part, TextPart)]
    if len(texts) == len(message.parts):
        return "".join(texts)  # templates of text models take a string only, those of vision models both
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.parts
    ]
