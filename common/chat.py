"""A chat through the chat template of a Hugging Face processor: the learner and the actor both render it here."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import InvalidRequest
from common.types import ChatMessage, ChatPrompt, Modality, TextPart

# Parameters of `apply_chat_template` that are no variables of the template, and variables that it is given anyway.
_NOT_OF_THE_CALLER = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "load_audio_from_video",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)


def render_chat(processor: Any, prompt: ChatPrompt, modalities: Sequence[Modality] | None = None) -> str:
    """The chat as text with one placeholder string for each media item, ready for the answer.

    `modalities` as in `template_messages`. Raises InvalidRequest for what the template cannot render.
    """
    try:
        text: str = processor.apply_chat_template(
            template_messages(prompt.messages, modalities),
            tokenize=False,
            add_generation_prompt=True,
            **prompt.template_arguments,
        )
    except Exception as error:  # a checkpoint's code on anybody's arguments: it raises whatever it likes
        field = "chat.template_arguments" if prompt.template_arguments else "prompt"
        raise InvalidRequest(field, " ".join(f"{type(error).__name__}: {error}".split())) from error
    return text


def template_arguments(values: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Arguments of a chat template as every template gets them: JSON, with whole numbers as `int`.

    Raises InvalidRequest, naming `field`, for what is no JSON, and for names that are not the caller's to give.
    """
    for name in sorted(_NOT_OF_THE_CALLER & values.keys()):
        raise InvalidRequest(field, f"{name} is no variable of a chat template that a caller gives")
    return {name: _as_json(value, field) for name, value in values.items()}


def _as_json(value: Any, field: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and abs(value) <= sys.float_info.max:
        # They are doubles on the wire.
        return int(float(value)) if float(value).is_integer() else value
    if isinstance(value, list | tuple):
        return [_as_json(item, field) for item in value]
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _as_json(item, field) for name, item in value.items()}
    raise InvalidRequest(field, f"has a {type(value).__name__} that JSON has no form for")


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
