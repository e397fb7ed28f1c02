import dataclasses
from typing import Any

import pytest

from actor.validation.request import check_request
from actor.validation.sampling import check_prompt_logprobs
from common.errors import InvalidRequest, OutriderError, TooLarge
from common.tensors import Tensor
from common.types import (
    ChatMessage,
    ChatPrompt,
    Constraint,
    Frames,
    MediaItem,
    MediaPart,
    Modality,
    PlaceholderRange,
    RepetitionDetection,
    RolloutRequest,
    SamplingParams,
    ServerLimits,
    StructuredOutput,
    TextPart,
    TextPrompt,
    TokenPrompt,
)

LIMITS = ServerLimits(max_group_size=8, max_context_tokens=100, max_media_items=2, max_media_bytes=10, max_videos=1)
HASH = bytes(32)


def _request(**values: Any) -> RolloutRequest:
    return RolloutRequest(**({"group_id": "g", "prompt": TextPrompt("hi")} | values))


def _chat(*parts: TextPart | MediaPart) -> ChatPrompt:
    return ChatPrompt((ChatMessage("user", parts),))


def _problem(request: RolloutRequest) -> str:
    with pytest.raises(OutriderError) as raised:
        check_request(request, LIMITS, vocab_size=320, suppressed_token_ids=(318, 319))
    return str(raised.value)


def test_good_requests_pass() -> None:
    check_request(_request(), LIMITS, 320)
    media = (MediaItem(HASH), MediaItem(HASH, b"0123456789"))
    chat = _chat(MediaPart(0), TextPart("and"), MediaPart(1))
    sampling = SamplingParams(n=8, temperature=2.0, max_tokens=100, seed=2**62, stop=("x",), allowed_token_ids=(319,))
    check_request(_request(prompt=chat, media=media, sampling=sampling), LIMITS, 320)
    for greedy in (SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, n=2, num_beams=2)):
        check_request(_request(sampling=greedy), LIMITS, 320)
    check_request(_request(prompt=TokenPrompt(tuple(range(100)))), LIMITS, 320)
    at_its_end = TokenPrompt((7, 1, 1), (PlaceholderRange(1, 2),))
    check_request(_request(prompt=at_its_end, media=(MediaItem(HASH),)), LIMITS, 320)
    pixels = MediaItem(HASH, pixels=Tensor("U8", (1, 3, 3), bytes(9)))
    check_request(_request(media=(pixels,)), dataclasses.replace(LIMITS, max_media_pixels=3), 320)
    for text in (TextPrompt("\u00e9" * 6400), _chat(TextPart("x" * 6000), TextPart("x" * 396))):
        check_request(_request(prompt=text), LIMITS, 320)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"group_id": ""}, "group_id: must have 1 to 128 characters"),
        ({"group_id": "x" * 129}, "group_id: must have 1 to 128 characters"),
        ({"min_policy_version": -1}, "min_policy_version: must not be negative"),
        ({"prompt": TextPrompt("")}, "text: is empty"),
        ({"prompt": TextPrompt("x" * 6401)}, "text: 6401 characters, more than 100 tokens can be"),
        # Characters: these have two bytes each.
        ({"prompt": TextPrompt("\u00e9" * 6401)}, "text: 6401 characters, more than 100 tokens can be"),
        (
            {"prompt": _chat(TextPart("x" * 6000), TextPart("x" * 397))},  # and "user"
            "chat.messages: 6401 characters, more than 100 tokens can be",
        ),
        (
            {"prompt": ChatPrompt((ChatMessage("x" * 6401, ()),))},
            "chat.messages: 6401 characters, more than 100 tokens can be",
        ),
        ({"prompt": ChatPrompt(())}, "chat.messages: is empty"),
        ({"prompt": ChatPrompt((ChatMessage("", ()),))}, "chat.messages[0].role: is empty"),
        (
            {"prompt": _chat(TextPart("a"), MediaPart(0))},
            "chat.messages[0].parts[1].media_index: is 0; each of the 0 media items is referred to once, in ascending"
            " order",
        ),
        (
            {"prompt": _chat(MediaPart(1), MediaPart(0)), "media": (MediaItem(HASH), MediaItem(HASH))},
            "chat.messages[0].parts[0].media_index: is 1; each of the 2 media items is referred to once, in ascending"
            " order",
        ),
        (
            {"prompt": _chat(MediaPart(0)), "media": (MediaItem(HASH), MediaItem(HASH))},
            "media: 2 items came, but the messages refer to 1",
        ),
        ({"media": (MediaItem(HASH),) * 3}, "media: 3 images; this server takes 2"),
        (
            {"media": (MediaItem(HASH, modality=Modality.VIDEO),) * 2},
            "media: 2 videos; this server takes 1 (its setting max_videos)",
        ),
        *(
            (
                {"media": (MediaItem(HASH, modality=Modality.VIDEO, frames_per_second=pace),)},
                f"media[0].frames_per_second: is {pace}; must be more than 0 and at most 1000",
            )
            for pace in (0.0, -1.0, 1001.0, float("inf"), float("nan"))
        ),
        (
            {"media": (MediaItem(HASH, modality=Modality.VIDEO, frames=Frames((b"01234", b"56789a"))),)},
            "media[0].frames: 11 bytes; the limit is 10",
        ),
        ({"media": (MediaItem(HASH, b""),)}, "media[0].encoded: is empty"),
        (
            {"media": (MediaItem(HASH), MediaItem(HASH, b"0123456789a"))},
            "media[1].encoded: 11 bytes; the limit is 10",
        ),
        ({"prompt": TokenPrompt(())}, "tokens.ids: is empty"),
        ({"prompt": TokenPrompt((0,) * 101)}, "tokens.ids: 101 ids; the context has 100"),
        ({"prompt": TokenPrompt((0, 320))}, "tokens.ids[1]: is 320; the vocabulary has 320 ids"),
        ({"prompt": TokenPrompt((-1,))}, "tokens.ids[0]: is -1; the vocabulary has 320 ids"),
        (
            {"prompt": TokenPrompt((0,), (PlaceholderRange(0, 1),))},
            "tokens.placeholders: 1 ranges for 0 media items",
        ),
    ],
)
def test_the_field_is_named(values: dict[str, Any], problem: str) -> None:
    assert _problem(_request(**values)) == problem


def test_logprobs_of_one_group_are_bounded() -> None:
    limits = dataclasses.replace(LIMITS, max_context_tokens=2**17, max_group_size=65)
    sampling = SamplingParams(n=64, max_tokens=2**13, top_logprobs=15)
    check_request(_request(sampling=sampling), limits, 320)
    check_request(_request(sampling=SamplingParams(n=65, max_tokens=2**17)), limits, 320)  # of the sampled ids only
    for change in ({"n": 64, "max_tokens": 2**13 + 1}, {"max_tokens": 0}, {"top_logprobs": 16}):
        with pytest.raises(TooLarge, match=r"sampling\.top_logprobs: n \* max_tokens"):
            check_request(_request(sampling=dataclasses.replace(sampling, **change)), limits, 320)


def test_logprobs_of_one_prompt_are_bounded() -> None:
    sampling = SamplingParams(prompt_top_logprobs=63)
    check_prompt_logprobs(sampling, 2**17, 2**30)
    check_prompt_logprobs(dataclasses.replace(sampling, prompt_top_logprobs=0), 2**24, 1)
    for top, num_tokens in ((63, 2**17 + 1), (64, 2**17)):
        with pytest.raises(TooLarge, match=r"sampling\.prompt_top_logprobs: prompt tokens \* "):
            check_prompt_logprobs(dataclasses.replace(sampling, prompt_top_logprobs=top), num_tokens, 2**30)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"n": 9}, "sampling.n: is 9; must be 1 to 8"),
        ({"temperature": -0.5}, "sampling.temperature: is -0.5; must be 0 to 2"),
        ({"temperature": float("nan")}, "sampling.temperature: is nan; must be 0 to 2"),
        ({"temperature": 2.5}, "sampling.temperature: is 2.5; must be 0 to 2"),
        ({"temperature": 0.0, "n": 2}, "sampling.n: is 2; greedy completions would all be the same"),
        ({"top_p": 0.0}, "sampling.top_p: is 0; must be 1e-06 to 1"),
        ({"top_k": 321}, "sampling.top_k: is 321; must be 0 to 320"),
        ({"min_p": 1.5}, "sampling.min_p: is 1.5; must be 0 to 1"),
        ({"max_tokens": 101}, "sampling.max_tokens: is 101; must be 0 to 100"),
        ({"max_tokens": 5, "min_tokens": 6}, "sampling.min_tokens: is 6; must be 0 to 5"),
        ({"repetition_penalty": float("inf")}, "sampling.repetition_penalty: is inf; must be 0.001 to 1000"),
        ({"presence_penalty": 3.0}, "sampling.presence_penalty: is 3; must be -2 to 2"),
        ({"frequency_penalty": -3.0}, "sampling.frequency_penalty: is -3; must be -2 to 2"),
        ({"seed": -1}, "sampling.seed: is -1; must be 0 to 4.61169e+18"),
        ({"stop_token_ids": (320,)}, "sampling.stop_token_ids[0]: is 320; the vocabulary has 320 ids"),
        ({"allowed_token_ids": (1, -2)}, "sampling.allowed_token_ids[1]: is -2; the vocabulary has 320 ids"),
        ({"stop": ("",)}, "sampling.stop[0]: must have 1 to 128 characters"),
        ({"stop": ("x",) * 17}, "sampling.stop: 17 strings; the limit is 16"),
        ({"temperature": 0.005}, "sampling.temperature: is 0.005; must be 0, or 0.01 or more"),
        ({"bad_words": ("x", "")}, "sampling.bad_words[1]: must have 1 to 128 characters"),
        ({"bad_token_ids": (1, 320)}, "sampling.bad_token_ids[1]: is 320; the vocabulary has 320 ids"),
        ({"bad_token_ids": (1,) * 1025}, "sampling.bad_token_ids: 1025 ids; the limit is 1024"),
        ({"allowed_token_ids": (1,) * 1025}, "sampling.allowed_token_ids: 1025 ids; the limit is 1024"),
        ({"stop_token_ids": (1,) * 97}, "sampling.stop_token_ids: 97 ids; the limit is 96"),
        ({"bad_words": ("x" * 125,) * 4}, "sampling.bad_words: 500 bytes; the limit is 496"),
        ({"bad_words": ("\u00e4" * 125,) * 2}, "sampling.bad_words: 500 bytes; the limit is 496"),
        ({"bad_token_ids": tuple(range(318))}, "sampling.bad_token_ids: no id is left to sample"),
        ({"allowed_token_ids": (318, 319)}, "sampling.allowed_token_ids: no id is left to sample"),
        ({"allowed_token_ids": (5,), "bad_token_ids": (5,)}, "sampling.allowed_token_ids: no id is left to sample"),
        ({"logit_bias": ((320, 1.0),)}, "sampling.logit_bias[320]: the vocabulary has 320 ids"),
        ({"logit_bias": ((5, 101.0),)}, "sampling.logit_bias[5]: is 101; must be -100 to 100"),
        ({"logit_bias": ((5, float("-inf")),)}, "sampling.logit_bias[5]: is -inf; must be -100 to 100"),
        ({"top_logprobs": 65}, "sampling.top_logprobs: is 65; must be 0 to 64"),
        ({"prompt_top_logprobs": 65}, "sampling.prompt_top_logprobs: is 65; must be 0 to 64"),
        ({"length_penalty": 1.0}, "sampling.length_penalty: has no effect without num_beams"),
        ({"num_beams": 33}, "sampling.num_beams: is 33; must be 1 to 32"),
        ({"num_beams": 2, "n": 3}, "sampling.n: is 3; must be 1 to 2"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "sampling.length_penalty: is nan; must be -32 to 32"),
        ({"num_beams": 2, "length_penalty": 32.5}, "sampling.length_penalty: is 32.5; must be -32 to 32"),
        ({"num_beams": 2, "length_penalty": -33.0}, "sampling.length_penalty: is -33; must be -32 to 32"),
        ({"num_beams": 2, "temperature": 0.5}, "sampling.temperature: does not go with num_beams; leave it unset"),
        ({"num_beams": 2, "top_k": 5}, "sampling.top_k: does not go with num_beams"),
        ({"num_beams": 2, "seed": 0}, "sampling.seed: does not go with num_beams"),
        ({"num_beams": 2, "stop": ("x",)}, "sampling.stop: does not go with num_beams"),
        ({"num_beams": 2, "top_logprobs": 1}, "sampling.top_logprobs: does not go with num_beams"),
        (
            {"repetition_detection": RepetitionDetection(0)},
            "sampling.repetition_detection.max_pattern_size: is 0; must be 1 to 256",
        ),
        (
            {"repetition_detection": RepetitionDetection(4, 5)},
            "sampling.repetition_detection.min_pattern_size: is 5; must be 1 to 4",
        ),
        (
            {"repetition_detection": RepetitionDetection(4, 1, 1)},
            "sampling.repetition_detection.min_count: is 1; must be 2 to 256",
        ),
        (
            {"structured_output": StructuredOutput(Constraint.CHOICE)},
            "sampling.structured_output.choice.texts: must be 1 to 1024 strings",
        ),
        (
            {"structured_output": StructuredOutput(Constraint.CHOICE, choices=("a", ""))},
            "sampling.structured_output.choice.texts[1]: is empty",
        ),
        (
            {"structured_output": StructuredOutput(Constraint.CHOICE, choices=("a" * 16385,))},
            "sampling.structured_output.choice.texts: more than 16384 characters",
        ),
        (
            {"structured_output": StructuredOutput(Constraint.REGEX, "a" * 4097)},
            "sampling.structured_output.regex: must have 1 to 4096 characters",
        ),
        (
            {"structured_output": StructuredOutput(Constraint.JSON_SCHEMA, "")},
            "sampling.structured_output.json_schema: must have 1 to 16384 characters",
        ),
        (
            {"structured_output": StructuredOutput(Constraint.JSON_OBJECT), "allowed_token_ids": (5,)},
            "sampling.allowed_token_ids: does not go with structured_output",
        ),
    ],
)
def test_the_sampling_field_is_named(values: dict[str, Any], problem: str) -> None:
    assert _problem(_request(sampling=dataclasses.replace(SamplingParams(), **values))) == problem


def test_ids_that_are_bad_count_among_those_with_a_bias() -> None:
    """vLLM gets them as biases."""
    limits, bad = ServerLimits(), tuple(range(1000))
    for num_ids in (1024, 1025):
        bias = tuple((token_id, 1.0) for token_id in range(900, num_ids))
        request = _request(sampling=SamplingParams(bad_token_ids=bad, logit_bias=bias))
        if num_ids == 1024:
            check_request(request, limits, 2000)
            continue
        with pytest.raises(InvalidRequest) as refused:
            check_request(request, limits, 2000)
        assert str(refused.value) == "sampling.logit_bias: 1025 ids; the limit is 1024"


def test_the_tokens_of_a_structure_are_bounded() -> None:
    """They are matched on the thread that all requests share."""
    limits = ServerLimits(max_group_size=256, max_context_tokens=2**17)
    structured = StructuredOutput(Constraint.REGEX, "a+")
    check_request(_request(sampling=SamplingParams(n=256, max_tokens=4096, structured_output=structured)), limits, 320)
    for sampling in (
        SamplingParams(n=256, max_tokens=4097, structured_output=structured),
        SamplingParams(n=9, structured_output=structured),
    ):
        total = sampling.n * (sampling.max_tokens or 2**17)
        with pytest.raises(TooLarge) as refused:
            check_request(_request(sampling=sampling), limits, 320)
        assert str(refused.value) == f"sampling.structured_output: n * max_tokens is {total}; the limit is 1048576"
