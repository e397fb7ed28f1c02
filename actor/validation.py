"""Whether a request keeps to what this server takes; everything that can be said without the bytes of its media."""

import math
from collections.abc import Iterable

from common.errors import InvalidRequest, TooLarge, Unimplemented
from common.types import ChatPrompt, MediaPart, RolloutRequest, SamplingParams, ServerLimits, TextPrompt, TokenPrompt

_MAX_GROUP_ID_CHARS = 128
_MAX_STOP_STRINGS = 16
_MAX_STOP_CHARS = 128
_MAX_TEXT_BYTES_PER_TOKEN = 64


def check_request(request: RolloutRequest, limits: ServerLimits, vocab_size: int) -> None:
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
            _check_text_bytes(text, "text", limits)
        case TokenPrompt():
            _check_tokens(request.prompt, limits, vocab_size)
    _check_sampling(request.sampling, limits, vocab_size)


def _check_media(request: RolloutRequest, limits: ServerLimits) -> None:
    if len(request.media) > limits.max_media_items:
        raise InvalidRequest("media", f"{len(request.media)} items; this server takes {limits.max_media_items}")
    for i, item in enumerate(request.media):
        if item.encoded is None:
            continue
        if not item.encoded:
            raise InvalidRequest(f"media[{i}].encoded", "is empty")
        if len(item.encoded) > limits.max_media_bytes:
            raise TooLarge(f"media[{i}].encoded", f"{len(item.encoded)} bytes; the limit is {limits.max_media_bytes}")


def _check_chat(prompt: ChatPrompt, num_media: int, limits: ServerLimits) -> None:
    if not prompt.messages:
        raise InvalidRequest("chat.messages", "is empty")
    next_media = 0
    num_chars = 0
    for i, message in enumerate(prompt.messages):
        if not message.role:
            raise InvalidRequest(f"chat.messages[{i}].role", "is empty")
        for j, part in enumerate(message.parts):
            field = f"chat.messages[{i}].parts[{j}]"
            if not isinstance(part, MediaPart):
                num_chars += len(part.text)
                _check_text_bytes(part.text, f"{field}.text", limits)
            elif part.index != next_media or part.index >= num_media:
                raise InvalidRequest(
                    f"{field}.media_index",
                    f"is {part.index}; each of the {num_media} media items is referred to once, in ascending order",
                )
            else:
                next_media += 1
    if next_media != num_media:
        raise InvalidRequest("media", f"{num_media} items came, but the messages refer to {next_media}")
    if num_chars > _MAX_TEXT_BYTES_PER_TOKEN * limits.max_context_tokens:
        raise InvalidRequest("chat.messages", f"more text than {limits.max_context_tokens} tokens can be")


def _check_text_bytes(text: str, field: str, limits: ServerLimits) -> None:
    """Text that cannot fit is not worth tokenizing."""
    if len(text) > _MAX_TEXT_BYTES_PER_TOKEN * limits.max_context_tokens:
        raise InvalidRequest(field, f"{len(text)} characters, more than {limits.max_context_tokens} tokens can be")


def _check_tokens(prompt: TokenPrompt, limits: ServerLimits, vocab_size: int) -> None:
    if prompt.placeholders:
        raise Unimplemented("tokens.placeholders", "this version takes unexpanded ids only")
    if not prompt.ids:
        raise InvalidRequest("tokens.ids", "is empty")
    if len(prompt.ids) > limits.max_context_tokens:
        raise InvalidRequest("tokens.ids", f"{len(prompt.ids)} ids; the context has {limits.max_context_tokens}")
    _check_ids(prompt.ids, "tokens.ids", vocab_size)


def _check_sampling(params: SamplingParams, limits: ServerLimits, vocab_size: int) -> None:
    _check_range("n", params.n, 1, limits.max_group_size)
    _check_range("temperature", params.temperature, 0, 100)
    _check_range("top_p", params.top_p, 1e-6, 1)
    _check_range("top_k", params.top_k, 0, vocab_size)
    _check_range("min_p", params.min_p, 0, 1)
    _check_range("max_tokens", params.max_tokens, 0, limits.max_context_tokens)
    _check_range("min_tokens", params.min_tokens, 0, params.max_tokens or limits.max_context_tokens)
    _check_range("repetition_penalty", params.repetition_penalty, 1e-3, 1e3)
    _check_range("presence_penalty", params.presence_penalty, -2, 2)
    _check_range("frequency_penalty", params.frequency_penalty, -2, 2)
    if params.seed is not None:
        _check_range("seed", params.seed, 0, 2**62)
    _check_ids(params.stop_token_ids, "sampling.stop_token_ids", vocab_size)
    _check_ids(params.allowed_token_ids, "sampling.allowed_token_ids", vocab_size)
    if len(params.stop) > _MAX_STOP_STRINGS:
        raise InvalidRequest("sampling.stop", f"{len(params.stop)} strings; the limit is {_MAX_STOP_STRINGS}")
    for i, text in enumerate(params.stop):
        if not 1 <= len(text) <= _MAX_STOP_CHARS:
            raise InvalidRequest(f"sampling.stop[{i}]", f"must have 1 to {_MAX_STOP_CHARS} characters")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"sampling.{name}", f"is {value:g}; must be {low:g} to {high:g}")


def _check_ids(ids: Iterable[int], field: str, vocab_size: int) -> None:
    for i, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{field}[{i}]", f"is {token_id}; the vocabulary has {vocab_size} ids")
