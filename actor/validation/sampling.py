"""Whether what a request says of sampling is within range, and whether its parts go together."""

import math
import unicodedata
from collections.abc import Sequence

from common.errors import InvalidRequest, TooLarge, Unimplemented
from common.types import (
    MAX_STRING_CHARS,
    MAX_STRINGS,
    MAX_TOKEN_IDS,
    Constraint,
    RepetitionDetection,
    SamplingParams,
    ServerLimits,
    StructuredOutput,
)

# Of these too there is a limit to what fits (see MAX_TOKEN_IDS); the ids that end the model's own completions count.
_MAX_STOP_IDS = 96
# There: 1,024 tokens in all, of each word with and without a space before it. A token is a byte or more.
_MAX_BAD_WORD_BYTES = 1024 // 2 - MAX_STRINGS
_MAX_CHOICES = 1024
_MAX_REGEX_CHARS = 4096
# Parsing a schema of this length takes some tenths of a second, compiling it seconds.
_MAX_SPEC_CHARS = 2**14
_MAX_PATTERN = 256
# vLLM takes a lower temperature for this one, without a word in its answer. (Less a rounding of float32.)
_MIN_TEMPERATURE = 0.00999
# vLLM refuses a higher one.
_MAX_TEMPERATURE = 2
# Tokens of one group with a structure: 256 completions of 4,096, or 8 of 131,072. They are matched on the one thread
# that all requests share, and an ambiguous grammar takes the longer for a token the more came before it.
_MAX_STRUCTURED_TOKENS = 2**20
# Logprobs of one group, and of one prompt: some 70 bytes each while vLLM holds them.
_MAX_GROUP_LOGPROBS = 2**23
# In the message of a completion, or of a prompt, at most: an alternative (an id below 2^21 and a logprob), and the rest
# of a token: its own ids and logprob, what frames its alternatives, and 16 bytes of text.
_ALTERNATIVE_BYTES = 7
_TOKEN_BYTES = 32
# A beam's score is divided by its length to this power: within a double for two million tokens, either way.
_MAX_LENGTH_PENALTY = 32
_DEFAULTS = SamplingParams()
# What beam search does nothing with, as vLLM's does nothing.
_NOT_WITH_BEAMS = (
    "top_p",
    "top_k",
    "min_p",
    "min_tokens",
    "seed",
    "stop_token_ids",
    "stop",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "top_logprobs",
    "bad_words",
    "structured_output",
    "include_stop_str_in_output",
    "repetition_detection",
)
# A grammar allows few tokens at a time; these could take the last of them away.
_NOT_WITH_STRUCTURE = ("allowed_token_ids", "bad_token_ids", "bad_words")


def check_sampling(
    params: SamplingParams, limits: ServerLimits, vocab_size: int, suppressed_token_ids: tuple[int, ...]
) -> None:
    """Raises InvalidRequest, TooLarge or Unimplemented, naming the field."""
    _check_range("n", params.n, 1, limits.max_group_size)
    _check_temperature(params)
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
    _check_token_ids(params, vocab_size, suppressed_token_ids)
    _check_strings("stop", params.stop)
    _check_strings("bad_words", params.bad_words)
    num_bytes = sum(len(unicodedata.normalize("NFKC", text).encode()) for text in params.bad_words)
    if num_bytes > _MAX_BAD_WORD_BYTES:
        raise InvalidRequest("sampling.bad_words", f"{num_bytes} bytes; the limit is {_MAX_BAD_WORD_BYTES}")
    _check_logprobs(params, limits)
    if params.structured_output is not None:
        _check_structured(params, params.structured_output, limits)
    if params.repetition_detection is not None:
        _check_repetition(params.repetition_detection)
    _check_beams(params, limits)


def check_prompt_logprobs(params: SamplingParams, num_prompt_tokens: int, max_message_bytes: int) -> None:
    """Raises TooLarge. For engines: how long a prompt is, is known when it has been expanded."""
    if not params.prompt_top_logprobs:
        return
    total = num_prompt_tokens * (1 + params.prompt_top_logprobs)
    if total > _MAX_GROUP_LOGPROBS:
        raise TooLarge(
            "sampling.prompt_top_logprobs",
            f"prompt tokens * (1 + prompt_top_logprobs) is {total}; the limit is {_MAX_GROUP_LOGPROBS}",
        )
    num_bytes = _message_bytes(num_prompt_tokens, params.prompt_top_logprobs)
    if num_bytes > max_message_bytes:
        raise TooLarge(
            "sampling.prompt_top_logprobs",
            f"a prompt of {num_prompt_tokens} tokens can take {num_bytes} bytes; the limit is {max_message_bytes}",
        )


def check_ids(ids: Sequence[int], field: str, vocab_size: int) -> None:
    """Raises InvalidRequest for an id that is not in the vocabulary."""
    if not ids or 0 <= min(ids) <= max(ids) < vocab_size:
        return  # a long prompt is looked through in no time
    for i, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{field}[{i}]", f"is {token_id}; the vocabulary has {vocab_size} ids")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"sampling.{name}", f"is {value:g}; must be {low:g} to {high:g}")


def _check_temperature(params: SamplingParams) -> None:
    _check_range("temperature", params.temperature, 0, _MAX_TEMPERATURE)
    if 0 < params.temperature < _MIN_TEMPERATURE:
        raise InvalidRequest("sampling.temperature", f"is {params.temperature:g}; must be 0, or 0.01 or more")
    if params.temperature == 0 and params.n > 1 and not params.num_beams:
        raise InvalidRequest("sampling.n", f"is {params.n}; greedy completions would all be the same")


def _check_token_ids(params: SamplingParams, vocab_size: int, suppressed_token_ids: tuple[int, ...]) -> None:
    check_ids(params.stop_token_ids, "sampling.stop_token_ids", vocab_size)
    check_ids(params.allowed_token_ids, "sampling.allowed_token_ids", vocab_size)
    check_ids(params.bad_token_ids, "sampling.bad_token_ids", vocab_size)
    _check_num_ids("stop_token_ids", len(params.stop_token_ids), _MAX_STOP_IDS)
    _check_num_ids("allowed_token_ids", len(params.allowed_token_ids), MAX_TOKEN_IDS)
    _check_num_ids("bad_token_ids", len(params.bad_token_ids), MAX_TOKEN_IDS)
    biased = {*params.bad_token_ids, *(token_id for token_id, _ in params.logit_bias)}  # vLLM gets them as one
    _check_num_ids("logit_bias", len(biased), MAX_TOKEN_IDS)
    for token_id, bias in params.logit_bias:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"sampling.logit_bias[{token_id}]", f"the vocabulary has {vocab_size} ids")
        _check_range(f"logit_bias[{token_id}]", bias, -100, 100)
    never = {*params.bad_token_ids, *suppressed_token_ids}
    if never.issuperset(params.allowed_token_ids) if params.allowed_token_ids else len(never) >= vocab_size:
        name = "allowed_token_ids" if params.allowed_token_ids else "bad_token_ids"
        raise InvalidRequest(f"sampling.{name}", "no id is left to sample")


def _check_num_ids(name: str, num_ids: int, limit: int) -> None:
    if num_ids > limit:
        raise InvalidRequest(f"sampling.{name}", f"{num_ids} ids; the limit is {limit}")


def _check_strings(name: str, texts: tuple[str, ...]) -> None:
    if len(texts) > MAX_STRINGS:
        raise InvalidRequest(f"sampling.{name}", f"{len(texts)} strings; the limit is {MAX_STRINGS}")
    for i, text in enumerate(texts):
        if not 1 <= len(text) <= MAX_STRING_CHARS:
            raise InvalidRequest(f"sampling.{name}[{i}]", f"must have 1 to {MAX_STRING_CHARS} characters")


def _check_logprobs(params: SamplingParams, limits: ServerLimits) -> None:
    _check_range("top_logprobs", params.top_logprobs, 0, limits.max_logprobs)
    _check_range("prompt_top_logprobs", params.prompt_top_logprobs, 0, limits.max_logprobs)
    if not params.top_logprobs:
        return
    max_tokens = params.max_tokens or limits.max_context_tokens
    total = params.n * max_tokens * (1 + params.top_logprobs)
    if total > _MAX_GROUP_LOGPROBS:
        raise TooLarge(
            "sampling.top_logprobs",
            f"n * max_tokens * (1 + top_logprobs) is {total}; the limit is {_MAX_GROUP_LOGPROBS}",
        )
    num_bytes = _message_bytes(max_tokens, params.top_logprobs)
    if num_bytes > limits.max_message_bytes:
        raise TooLarge(
            "sampling.top_logprobs",
            f"a completion of max_tokens can take {num_bytes} bytes; the limit is {limits.max_message_bytes}",
        )


def _message_bytes(num_tokens: int, num_alternatives: int) -> int:
    """Most that tokens with their alternatives take."""
    return num_tokens * (_TOKEN_BYTES + _ALTERNATIVE_BYTES * num_alternatives)


def _check_structured(params: SamplingParams, structured: StructuredOutput, limits: ServerLimits) -> None:
    field = "sampling.structured_output"
    total = params.n * (params.max_tokens or limits.max_context_tokens)
    if total > _MAX_STRUCTURED_TOKENS:
        raise TooLarge(field, f"n * max_tokens is {total}; the limit is {_MAX_STRUCTURED_TOKENS}")
    for name in _NOT_WITH_STRUCTURE:
        if getattr(params, name):
            raise Unimplemented(f"sampling.{name}", "does not go with structured_output")
    match structured.constraint:
        case Constraint.CHOICE:
            if not 1 <= len(structured.choices) <= _MAX_CHOICES:
                raise InvalidRequest(f"{field}.choice.texts", f"must be 1 to {_MAX_CHOICES} strings")
            if sum(map(len, structured.choices)) > _MAX_SPEC_CHARS:
                raise InvalidRequest(f"{field}.choice.texts", f"more than {_MAX_SPEC_CHARS} characters")
            for i, text in enumerate(structured.choices):
                if not text:
                    raise InvalidRequest(f"{field}.choice.texts[{i}]", "is empty")
        case Constraint.JSON_OBJECT:
            pass
        case constraint:
            limit = _MAX_REGEX_CHARS if constraint is Constraint.REGEX else _MAX_SPEC_CHARS
            if not 1 <= len(structured.spec) <= limit:
                raise InvalidRequest(f"{field}.{constraint.value}", f"must have 1 to {limit} characters")


def _check_repetition(detection: RepetitionDetection) -> None:
    name = "repetition_detection"
    _check_range(f"{name}.max_pattern_size", detection.max_pattern_size, 1, _MAX_PATTERN)
    _check_range(f"{name}.min_pattern_size", detection.min_pattern_size, 1, detection.max_pattern_size)
    _check_range(f"{name}.min_count", detection.min_count, 2, _MAX_PATTERN)


def _check_beams(params: SamplingParams, limits: ServerLimits) -> None:
    if not params.num_beams:
        if params.length_penalty is not None:
            raise InvalidRequest("sampling.length_penalty", "has no effect without num_beams")
        return
    _check_range("num_beams", params.num_beams, 1, limits.max_logprobs // 2)
    _check_range("n", params.n, 1, params.num_beams)
    if params.length_penalty is not None:
        _check_range("length_penalty", params.length_penalty, -_MAX_LENGTH_PENALTY, _MAX_LENGTH_PENALTY)
    for name in _NOT_WITH_BEAMS:
        if getattr(params, name) != getattr(_DEFAULTS, name):
            raise Unimplemented(f"sampling.{name}", "does not go with num_beams")
    if params.temperature not in {0, 1}:
        raise Unimplemented("sampling.temperature", "does not go with num_beams; leave it unset")
