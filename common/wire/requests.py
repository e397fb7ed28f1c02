"""`GenerateRequest` and `RolloutRequest`."""

from common.chat import arguments_from_json, arguments_to_json
from common.errors import InvalidRequest
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.types import (
    ChatMessage,
    ChatPrompt,
    MediaPart,
    PlaceholderRange,
    Prompt,
    RolloutRequest,
    TextPart,
    TextPrompt,
    TokenPrompt,
)
from common.wire.bounds import check_count
from common.wire.media import media_from_proto, media_to_proto
from common.wire.sampling import sampling_from_proto, sampling_to_proto

# More than any model takes; what a server takes is less, and checked in `actor.validation.request`.
_MAX_MESSAGES = 4096
_MAX_PARTS = 4096
_MAX_MEDIA = 4096
_MAX_IDS = 2**21

_ARGUMENTS = "chat.template_arguments"


def request_to_proto(request: RolloutRequest) -> pb.GenerateRequest:
    """Everything is written out, so that the server's defaults play no part."""
    message = pb.GenerateRequest(
        group_id=request.group_id,
        media=[media_to_proto(item) for item in request.media],
        sampling=sampling_to_proto(request.sampling),
        min_policy_version=request.min_policy_version,
        model=request.model,
        run_id=request.run_id,
    )
    message.returns.text = request.return_text
    message.returns.processed_media = request.return_processed
    message.returns.routed_experts = request.return_routed_experts
    match request.prompt:
        case ChatPrompt(messages, arguments):
            message.chat.messages.extend(_chat_message_to_proto(chat_message) for chat_message in messages)
            if arguments:
                message.chat.template_arguments = arguments_to_json(arguments, _ARGUMENTS)
        case TextPrompt(text):
            message.text = text
        case TokenPrompt(ids, placeholders):
            message.tokens.ids.extend(ids)
            message.tokens.placeholders.extend(
                pb.PlaceholderRange(offset=run.offset, length=run.length) for run in placeholders
            )
    return message


def request_from_proto(message: pb.GenerateRequest) -> RolloutRequest:
    """Raises InvalidRequest, naming the field."""
    check_count(message.media, "media", _MAX_MEDIA)
    return RolloutRequest(
        group_id=message.group_id,
        prompt=_prompt_from_proto(message),
        media=tuple(media_from_proto(item, f"media[{i}]") for i, item in enumerate(message.media)),
        sampling=sampling_from_proto(message.sampling, "sampling"),
        min_policy_version=message.min_policy_version,
        return_text=message.returns.text,
        return_processed=message.returns.processed_media,
        return_routed_experts=message.returns.routed_experts,
        model=message.model,
        run_id=message.run_id,
    )


def _chat_message_to_proto(message: ChatMessage) -> pb.ChatMessage:
    parts = [
        pb.ChatPart(text=part.text) if isinstance(part, TextPart) else pb.ChatPart(media_index=part.index)
        for part in message.parts
    ]
    return pb.ChatMessage(role=message.role, parts=parts)


def _prompt_from_proto(message: pb.GenerateRequest) -> Prompt:
    match message.WhichOneof("prompt"):
        case "chat":
            check_count(message.chat.messages, "chat.messages", _MAX_MESSAGES)
            return ChatPrompt(
                tuple(
                    ChatMessage(chat_message.role, _parts_from_proto(chat_message, f"chat.messages[{i}]"))
                    for i, chat_message in enumerate(message.chat.messages)
                ),
                arguments_from_json(message.chat.template_arguments or "{}", _ARGUMENTS),
            )
        case "text":
            return TextPrompt(message.text)
        case "tokens":
            check_count(message.tokens.ids, "tokens.ids", _MAX_IDS)
            check_count(message.tokens.placeholders, "tokens.placeholders", _MAX_MEDIA)
            runs = tuple(PlaceholderRange(run.offset, run.length) for run in message.tokens.placeholders)
            return TokenPrompt(tuple(message.tokens.ids), runs)
        case _:
            raise InvalidRequest("prompt", "is missing; set one of chat, text or tokens")


def _parts_from_proto(message: pb.ChatMessage, field: str) -> tuple[TextPart | MediaPart, ...]:
    check_count(message.parts, f"{field}.parts", _MAX_PARTS)
    parts: list[TextPart | MediaPart] = []
    for i, part in enumerate(message.parts):
        match part.WhichOneof("part"):
            case "text":
                parts.append(TextPart(part.text))
            case "media_index":
                parts.append(MediaPart(part.media_index))
            case _:
                raise InvalidRequest(f"{field}.parts[{i}]", "is empty; set text or media_index")
    return tuple(parts)
