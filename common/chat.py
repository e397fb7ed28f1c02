"""A chat through the chat template of a Hugging Face processor: the learner and the actor both render it here."""

import json
import logging
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
# Room for the description of tools.
_MAX_ARGUMENT_BYTES = 2**16

# transformers says so for each chat with an argument that its template does not use, which is no mistake here.
logging.getLogger("transformers.processing_utils").addFilter(
    lambda record: not str(record.msg).startswith("Kwargs passed to `processor.__call__` have to be in")
)


def render_chat(processor: Any, prompt: ChatPrompt, modalities: Sequence[Modality] | None = None) -> str:
    """The chat as text with one placeholder string for each media item, ready for the answer.

    `modalities` as in `template_messages`. Raises InvalidRequest for what the template cannot render, and where the
    model has none.
    """
    if not has_template(processor):
        raise InvalidRequest("chat", "the model has no chat template; give it one, or send text or token ids")
    arguments = template_arguments(prompt.template_arguments, "chat.template_arguments")
    try:
        text: str = processor.apply_chat_template(
            template_messages(prompt.messages, modalities),
            tokenize=False,
            add_generation_prompt=True,
            **arguments,
        )
    except Exception as error:  # a checkpoint's code on anybody's arguments: it raises whatever it likes
        field = "chat.template_arguments" if arguments else "prompt"
        raise InvalidRequest(field, " ".join(f"{type(error).__name__}: {error}".split())) from error
    return text


def has_template(processor: Any) -> bool:
    """Whether a processor, or the tokenizer of a text model, has one; base models have none."""
    return bool(getattr(processor, "chat_template", None))


def template_arguments(values: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Arguments of a chat template as every template gets them, wherever it runs: what JSON makes of them.

    Raises InvalidRequest as `arguments_to_json` and `arguments_from_json` do.
    """
    return arguments_from_json(arguments_to_json(values, field), field)


def arguments_to_json(values: Mapping[str, Any], field: str) -> str:
    """Raises InvalidRequest, naming `field`, for what JSON has no form for."""
    try:
        text = json.dumps(dict(values), allow_nan=False, ensure_ascii=False)
        text.encode()  # half a surrogate pair is no text
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"has no form in JSON: {error}") from error
    return text


def arguments_from_json(text: str, field: str) -> dict[str, Any]:
    """Names in their order, at every depth: a template that writes out `tools` keeps it.

    Raises InvalidRequest, naming `field`, for more than 64 KiB, what is no JSON object, a name that comes twice, and
    names that are not the caller's to give.
    """
    num_bytes = len(text.encode())
    if num_bytes > _MAX_ARGUMENT_BYTES:
        raise InvalidRequest(field, f"{num_bytes} bytes of JSON; the limit is {_MAX_ARGUMENT_BYTES}")
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequest(field, f"is a JSON {type(values).__name__}; give an object")
    arguments_to_json(values, field)  # Python reads more than JSON: NaN, 1e999
    for name in sorted(_NOT_OF_THE_CALLER & values.keys()):
        raise InvalidRequest(field, f"{name} is no variable of a chat template that a caller gives")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} comes twice in one object")
        values[name] = value
    return values


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
