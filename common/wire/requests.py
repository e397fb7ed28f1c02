"""`GenerateRequest` and `RolloutRequest`."""

from common.errors import InvalidRequest, Unimplemented
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.types import (
    ChatMessage,
    ChatPrompt,
    MediaItem,
    MediaPart,
    Modality,
    PlaceholderRange,
    Prompt,
    RolloutRequest,
    SamplingParams,
    TextPart,
    TextPrompt,
    TokenPrompt,
)

_MODALITY = {Modality.IMAGE: pb.MODALITY_IMAGE, Modality.VIDEO: pb.MODALITY_VIDEO}
# Fields of SamplingParams by kind; the names are the same on both sides.
_PLAIN = ("n", "max_tokens", "min_tokens", "ignore_eos")
_OPTIONAL = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_REPEATED = ("stop_token_ids", "stop", "allowed_token_ids")


def request_to_proto(request: RolloutRequest) -> pb.GenerateRequest:
    """Everything is written out, so that the server's defaults play no part."""
    message = pb.GenerateRequest(
        group_id=request.group_id,
        media=[_media_to_proto(item) for item in request.media],
        sampling=_sampling_to_proto(request.sampling),
        min_policy_version=request.min_policy_version,
    )
    message.returns.text = request.return_text
    match request.prompt:
        case ChatPrompt(messages):
            message.chat.messages.extend(_chat_message_to_proto(chat_message) for chat_message in messages)
        case TextPrompt(text):
            message.text = text
        case TokenPrompt(ids, placeholders):
            message.tokens.ids.extend(ids)
            message.tokens.placeholders.extend(
                pb.PlaceholderRange(offset=run.offset, length=run.length) for run in placeholders
            )
    return message


def request_from_proto(message: pb.GenerateRequest) -> RolloutRequest:
    """Raises InvalidRequest and Unimplemented, naming the field."""
    if message.returns.processed_media:
        raise Unimplemented("returns.processed_media", "processed tensors are not returned by this version")
    if message.returns.routed_experts:
        raise Unimplemented("returns.routed_experts", "routed experts are not returned by this version")
    return RolloutRequest(
        group_id=message.group_id,
        prompt=_prompt_from_proto(message),
        media=tuple(_media_from_proto(item, f"media[{i}]") for i, item in enumerate(message.media)),
        sampling=_sampling_from_proto(message.sampling),
        min_policy_version=message.min_policy_version,
        return_text=message.returns.text,
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
            return ChatPrompt(
                tuple(
                    ChatMessage(chat_message.role, _parts_from_proto(chat_message, f"chat.messages[{i}]"))
                    for i, chat_message in enumerate(message.chat.messages)
                )
            )
        case "text":
            return TextPrompt(message.text)
        case "tokens":
            runs = tuple(PlaceholderRange(run.offset, run.length) for run in message.tokens.placeholders)
            return TokenPrompt(tuple(message.tokens.ids), runs)
        case _:
            raise InvalidRequest("prompt", "is missing; set one of chat, text or tokens")


def _parts_from_proto(message: pb.ChatMessage, field: str) -> tuple[TextPart | MediaPart, ...]:
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


def _media_to_proto(item: MediaItem) -> pb.MediaItem:
    message = pb.MediaItem(modality=_MODALITY[item.modality], sha256=item.sha256)
    if item.encoded is not None:
        message.encoded = item.encoded
    return message


def _media_from_proto(item: pb.MediaItem, field: str) -> MediaItem:
    if item.modality == pb.MODALITY_VIDEO:
        raise Unimplemented(f"{field}.modality", "video is not taken by this version")
    if item.modality != pb.MODALITY_IMAGE:
        raise InvalidRequest(f"{field}.modality", "must be MODALITY_IMAGE")
    content = item.WhichOneof("content")
    if content in ("pixels", "processed"):
        raise Unimplemented(f"{field}.{content}", "this version takes encoded images only")
    if item.HasField("processor"):
        raise Unimplemented(f"{field}.processor", "this version uses the model's own processor options")
    if len(item.sha256) not in (0, 32):
        raise InvalidRequest(f"{field}.sha256", f"must be 32 bytes, not {len(item.sha256)}")
    if content is None and not item.sha256:
        raise InvalidRequest(f"{field}.content", "is missing; send encoded, or the sha256 of stored bytes")
    return MediaItem(item.sha256, item.encoded if content == "encoded" else None)


def _sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    names = (*_PLAIN, *_OPTIONAL, *_REPEATED)
    return pb.SamplingParams(**{name: getattr(params, name) for name in names})


def _sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    if message.top_logprobs:
        raise Unimplemented("sampling.top_logprobs", "this version returns the sampled token's logprob only")
    if message.prompt_logprobs:
        raise Unimplemented("sampling.prompt_logprobs", "prompt logprobs are not returned by this version")
    values = {name: getattr(message, name) for name in _PLAIN}
    values |= {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}  # type: ignore[arg-type]
    values |= {name: tuple(getattr(message, name)) for name in _REPEATED}
    values["n"] = values["n"] or 1
    return SamplingParams(**values)
