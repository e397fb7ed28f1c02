"""Whether a request keeps to what this server takes; everything that can be said without the bytes of its media."""

import math

from actor.media.store import content_bytes
from actor.validation.sampling import check_ids, check_sampling
from common.errors import InvalidRequest, TooLarge
from common.tensors import Tensor
from common.types import (
    ChatPrompt,
    MediaItem,
    MediaPart,
    Modality,
    RolloutRequest,
    ServerLimits,
    TextPrompt,
    TokenPrompt,
)

_MAX_GROUP_ID_CHARS = 128
_MAX_CHARS_PER_TOKEN = 64
_MAX_FRAMES_PER_SECOND = 1000


def check_request(
    request: RolloutRequest, limits: ServerLimits, vocab_size: int, suppressed_token_ids: tuple[int, ...] = ()
) -> None:
    """Raises InvalidRequest, TooLarge or Unimplemented, naming the field by its path in the proto file."""
    if not 1 <= len(request.group_id) <= _MAX_GROUP_ID_CHARS:
        raise InvalidRequest("group_id", f"must have 1 to {_MAX_GROUP_ID_CHARS} characters")
    if request.min_policy_version < 0:
        raise InvalidRequest("min_policy_version", "must not be negative")
    _check_media(request, limits)
    match request.prompt:
        case ChatPrompt():
            _check_chat(request.prompt, len(request.media), limits)
        case TextPrompt(text):
            if not text:
                raise InvalidRequest("text", "is empty")
            _check_num_chars(len(text), "text", limits)
        case TokenPrompt():
            _check_tokens(request.prompt, len(request.media), limits, vocab_size)
    check_sampling(request.sampling, limits, vocab_size, suppressed_token_ids)


def _check_media(request: RolloutRequest, limits: ServerLimits) -> None:
    num_videos = sum(item.modality is Modality.VIDEO for item in request.media)
    num_images = len(request.media) - num_videos
    if num_images > limits.max_media_items:
        raise InvalidRequest("media", f"{num_images} images; this server takes {limits.max_media_items}")
    if num_videos > limits.max_videos:
        raise InvalidRequest(
            "media", f"{num_videos} videos; this server takes {limits.max_videos} (its setting max_videos)"
        )
    for i, item in enumerate(request.media):
        _check_options(item, f"media[{i}].processor", limits)
        _check_pace(item, f"media[{i}].frames_per_second")
        if item.encoded is not None:
            if not item.encoded:
                raise InvalidRequest(f"media[{i}].encoded", "is empty")
            _check_bytes(len(item.encoded), f"media[{i}].encoded", limits)
        elif item.frames is not None:
            _check_bytes(content_bytes(item.frames), f"media[{i}].frames", limits)
        elif item.pixels is not None:
            _check_pixels(item, item.pixels, f"media[{i}].pixels", limits)
        elif item.processed:
            _check_bytes(content_bytes(item.processed), f"media[{i}].processed", limits)


def _check_bytes(num_bytes: int, field: str, limits: ServerLimits) -> None:
    if num_bytes > limits.max_media_bytes:
        raise TooLarge(field, f"{num_bytes} bytes; the limit is {limits.max_media_bytes}")


def _check_pixels(item: MediaItem, pixels: Tensor, field: str, limits: ServerLimits) -> None:
    if pixels.dtype != "U8":
        raise InvalidRequest(f"{field}.dtype", "must be DTYPE_UINT8")
    sizes = ["height", "width", "3"] if item.modality is Modality.IMAGE else ["frames", "height", "width", "3"]
    if len(pixels.shape) != len(sizes) or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise InvalidRequest(f"{field}.shape", f"is {list(pixels.shape)}; must be [{', '.join(sizes)}]")
    *frames, height, width, _ = pixels.shape
    if frames and frames[0] > limits.max_video_frames:
        raise TooLarge(field, f"{frames[0]} frames, more than the limit of {limits.max_video_frames}")
    if math.prod(frames) * height * width > limits.max_media_pixels:
        size = "x".join(map(str, [*frames, width, height]))
        raise TooLarge(field, f"{size} pixels, more than the limit of {limits.max_media_pixels}")


def _check_pace(item: MediaItem, field: str) -> None:
    pace = item.frames_per_second
    if pace is None:
        return
    if not (math.isfinite(pace) and 0 < pace <= _MAX_FRAMES_PER_SECOND):
        raise InvalidRequest(field, f"is {pace}; must be more than 0 and at most {_MAX_FRAMES_PER_SECOND}")


def _check_options(item: MediaItem, field: str, limits: ServerLimits) -> None:
    for name, value in (("min_pixels", item.min_pixels), ("max_pixels", item.max_pixels)):
        if value is not None and not 1 <= value <= limits.max_media_pixels:
            raise InvalidRequest(f"{field}.{name}", f"is {value}; must be 1 to {limits.max_media_pixels}")
    if item.min_pixels is not None and item.max_pixels is not None and item.min_pixels > item.max_pixels:
        raise InvalidRequest(f"{field}.min_pixels", f"is {item.min_pixels}, more than max_pixels: {item.max_pixels}")


def _check_chat(prompt: ChatPrompt, num_media: int, limits: ServerLimits) -> None:
    if not prompt.messages:
        raise InvalidRequest("chat.messages", "is empty")
    next_media = 0
    num_chars = 0
    for i, message in enumerate(prompt.messages):
        if not message.role:
            raise InvalidRequest(f"chat.messages[{i}].role", "is empty")
        num_chars += len(message.role)
        for j, part in enumerate(message.parts):
            if not isinstance(part, MediaPart):
                num_chars += len(part.text)
            elif part.index != next_media or part.index >= num_media:
                raise InvalidRequest(
                    f"chat.messages[{i}].parts[{j}].media_index",
                    f"is {part.index}; each of the {num_media} media items is referred to once, in ascending order",
                )
            else:
                next_media += 1
    if next_media != num_media:
        raise InvalidRequest("media", f"{num_media} items came, but the messages refer to {next_media}")
    _check_num_chars(num_chars, "chat.messages", limits)


def _check_num_chars(num_chars: int, field: str, limits: ServerLimits) -> None:
    """Text that cannot fit is not worth tokenizing."""
    if num_chars > _MAX_CHARS_PER_TOKEN * limits.max_context_tokens:
        raise InvalidRequest(field, f"{num_chars} characters, more than {limits.max_context_tokens} tokens can be")


def _check_tokens(prompt: TokenPrompt, num_media: int, limits: ServerLimits, vocab_size: int) -> None:
    if not prompt.ids:
        raise InvalidRequest("tokens.ids", "is empty")
    if len(prompt.ids) > limits.max_context_tokens:
        raise InvalidRequest("tokens.ids", f"{len(prompt.ids)} ids; the context has {limits.max_context_tokens}")
    check_ids(prompt.ids, "tokens.ids", vocab_size)
    if prompt.placeholders and len(prompt.placeholders) != num_media:
        raise InvalidRequest("tokens.placeholders", f"{len(prompt.placeholders)} ranges for {num_media} media items")
    end = 0
    for i, run in enumerate(prompt.placeholders):
        field = f"tokens.placeholders[{i}]"
        if not run.length:
            raise InvalidRequest(f"{field}.length", "is 0")
        if run.offset < end:
            raise InvalidRequest(f"{field}.offset", f"is {run.offset}, before the end of the range before it, {end}")
        end = run.offset + run.length
        if end > len(prompt.ids):
            raise InvalidRequest(field, f"ends at {end}; there are {len(prompt.ids)} ids")
