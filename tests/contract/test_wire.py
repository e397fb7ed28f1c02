"""The codec of rollouts: golden bytes that must never change, and round trips."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from common import wire
from common.media import frames_hash, media_hash
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.tensors import NamedTensor, Tensor, pixels_hash, tensors_hash
from common.types import (
    BeamScore,
    ChatMessage,
    ChatPrompt,
    Completion,
    Constraint,
    FinishReason,
    Frames,
    MediaItem,
    MediaPart,
    MediaUse,
    Modality,
    PlaceholderRange,
    PromptInfo,
    RepetitionDetection,
    RolloutRequest,
    SamplingParams,
    ServerInfo,
    ServerLimits,
    StructuredOutput,
    TextPart,
    TextPrompt,
    TokenPrompt,
    TopLogprobs,
    VersionSpan,
)

HASH = bytes(range(32))

REQUEST = RolloutRequest(
    group_id="g1",
    prompt=ChatPrompt((ChatMessage("user", (MediaPart(0), TextPart("Which digit?"))),)),
    media=(MediaItem(HASH, b"\x89PNG"), MediaItem(HASH)),
    sampling=SamplingParams(
        n=8,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        max_tokens=16,
        min_tokens=2,
        seed=3,
        stop_token_ids=(1, 300),
        stop=("x",),
        ignore_eos=True,
        allowed_token_ids=(5,),
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
    ),
    min_policy_version=4,
    return_text=True,
    model="critic",
    run_id="r1",
)

INFO = PromptInfo(
    group_id="g1",
    actor_id="a1",
    unexpanded_ids=np.array([1, 2], np.int32),
    expanded_ids=np.array([1, 2, 2, 300], np.int32),
    media=(MediaUse(HASH, PlaceholderRange(1, 2), 2, (1, 4, 2)),),
    suppressed_token_ids=(2,),
)

COMPLETION = Completion(
    trajectory_id="g1/0/a1",
    index=0,
    token_ids=np.array([7, 300], np.int32),
    logprobs=np.array([-0.5, -2.0], np.float32),
    finish_reason=FinishReason.STOP,
    version_spans=(VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)),
    first_token_s=0.25,
    finished_s=0.5,
    text="7",
)


def test_golden_request() -> None:
    """By hand, field by field: tag = number << 3 | wire type, then a varint, fixed32 or length-delimited value."""
    sampling = (
        "08 08"  # 1: n = 8
        "15 0000003f 1d 0000803e"  # 2, 3: temperature = 0.5, top_p = 0.25
        "20 07"  # 4: top_k = 7
        "2d 0000003e"  # 5: min_p = 0.125
        "30 10 38 02 40 03"  # 6, 7, 8: max_tokens, min_tokens, seed
        "4a 03 01ac02"  # 9: stop_token_ids, packed: 300 = ac 02
        "52 01 78"  # 10: stop = "x"
        "58 01"  # 11: ignore_eos
        "62 01 05"  # 12: allowed_token_ids
        "6d 0000c03f 75 000000bf 7d 0000403f"  # 13, 14, 15: penalties
    )
    expected = (
        "0a 02 6731"  # 1: group_id = "g1"
        # 2: chat { 1: messages { 1: role, 2: part { 2: media_index = 0 }, 2: part { 1: text } } }
        "12 1c 0a1a 0a04 75736572 1202 1000 120e 0a0c" + b"Which digit?".hex() +
        # 5: media { 1: modality = IMAGE, 2: sha256, 3: encoded }
        "2a 2a 0801 1220" + HASH.hex() + "1a04 89504e47"
        "2a 24 0801 1220" + HASH.hex() +
        # 6: sampling
        "32" + f"{len(bytes.fromhex(sampling)):02x}" + sampling +
        # 7: returns { 3: text }; 8: min_policy_version; 9: model; 10: run_id
        "3a 02 1801 40 04 4a 06" + b"critic".hex() + "52 02 7231"
    )  # fmt: skip
    assert wire.request_to_proto(REQUEST).SerializeToString(deterministic=True).hex() == expected.replace(" ", "")


def test_golden_options_and_tensors() -> None:
    """As above, for what else a request can say."""
    pixels = Tensor("U8", (1, 1, 3), b"\1\2\3")
    grid = NamedTensor("grid", Tensor("I64", (1,), (7).to_bytes(8, "little")))
    request = RolloutRequest(
        "g",
        TokenPrompt((9, 9), (PlaceholderRange(1, 1),)),
        (MediaItem(b"", pixels=pixels, min_pixels=300), MediaItem(b"", processed=(grid,))),
        SamplingParams(
            top_logprobs=3,
            prompt_logprobs=True,
            logit_bias=((5, 0.5),),
            bad_token_ids=(6,),
            bad_words=("no",),
            prompt_top_logprobs=4,
            structured_output=StructuredOutput(Constraint.REGEX, "a+"),
            num_beams=2,
            length_penalty=0.5,
            include_stop_str_in_output=True,
            skip_special_tokens=True,
            repetition_detection=RepetitionDetection(5, 1, 3),
        ),
        return_processed=True,
    )
    sampling = (
        "0801"  # 1: n
        "15 0000803f 1d 0000803f 2000 2d 00000000"  # 2 to 5: temperature, top_p, top_k, min_p
        "6d 0000803f 75 00000000 7d 00000000"  # 13 to 15: penalties
        "8001 03 8801 01"  # 16, 17: top_logprobs, prompt_logprobs
        "9201 07 0805 15 0000003f"  # 18: logit_bias { 5: 0.5 }
        "9a01 01 06 a201 02 6e6f"  # 19, 20: bad_token_ids, bad_words
        "a801 04"  # 21: prompt_top_logprobs
        "b201 04 0a02 612b"  # 22: structured_output { 1: regex }
        "b801 02 c501 0000003f"  # 23, 24: num_beams, length_penalty
        "c801 01 d001 01"  # 25, 26
        "da01 06 0805 1001 1803"  # 27: repetition_detection
    )
    expected = (
        "0a01 67"
        "22 0a 0a02 0909 1204 0801 1001"  # 4: tokens { 1: ids, 2: placeholders { offset, length } }
        "2a 15 0801 220c 0802 1203 010103 1a03 010203 3203 08ac02"  # 5: { modality, 4: pixels, 6: { 1: min_pixels } }
        # 5: { 5: { 1: { name, tensor } } }
        "2a 1d 0801 2a19 0a17 0a04 67726964 120f 0805 1201 01 1a08 0700000000000000"
        "32" + f"{len(bytes.fromhex(sampling)):02x}" + sampling + "3a 02 0801"
    )  # fmt: skip
    assert wire.request_to_proto(request).SerializeToString(deterministic=True).hex() == expected.replace(" ", "")
    assert wire.request_from_proto(wire.request_to_proto(request)) == request


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput(Constraint.REGEX, "a*"),
        StructuredOutput(Constraint.JSON_SCHEMA, "{}"),
        StructuredOutput(Constraint.CHOICE, choices=("a", "b")),
        StructuredOutput(Constraint.GRAMMAR, 'root ::= "x"'),
        StructuredOutput(Constraint.JSON_OBJECT),
    ],
)
def test_structures_round_trip(structured: StructuredOutput) -> None:
    request = RolloutRequest("g", TextPrompt("x"), sampling=SamplingParams(structured_output=structured))
    assert wire.request_from_proto(wire.request_to_proto(request)) == request


def test_the_hash_of_tensors_is_the_documented_one() -> None:
    """By the words of the proto file."""
    pixels = Tensor("U8", (1, 2, 3), bytes(range(6)))
    assert pixels_hash(pixels) == hashlib.sha256(b"pixels UINT8 1,2,3\n" + bytes(range(6))).digest()
    b, a = NamedTensor("b", Tensor("BF16", (1,), b"xy")), NamedTensor("a", Tensor("I64", (), bytes(8)))
    expected = hashlib.sha256(b"a INT64 \n" + bytes(8) + b"b BFLOAT16 1\n" + b"xy").digest()
    assert tensors_hash((b, a)) == tensors_hash((a, b)) == expected


def test_golden_template_arguments() -> None:
    chat = ChatPrompt(REQUEST.prompt.messages, {"n": 2, "é": 1.0})  # type: ignore[union-attr]
    message = wire.request_to_proto(RolloutRequest("g", chat))
    text = '{"n": 2, "é": 1.0}'.encode()
    assert message.chat.SerializeToString().endswith(b"\x12" + bytes([len(text)]) + text)  # 2: template_arguments
    assert repr(wire.request_from_proto(message).prompt) == repr(chat)


def test_arguments_of_the_template_stay_in_their_order() -> None:
    """A template writes `tools` out as they come, so that another order is another prompt."""
    function = {"name": "zoom", "description": "?", "parameters": {"type": "object", "properties": {"y": 1, "x": 2}}}
    arguments = {"tools": [{"type": "function", "function": function}], "enable_thinking": True, "budget": 9}
    message = wire.request_to_proto(RolloutRequest("g", ChatPrompt((), arguments)))
    found = wire.request_from_proto(pb.GenerateRequest.FromString(message.SerializeToString())).prompt
    assert isinstance(found, ChatPrompt)
    assert json.dumps(found.template_arguments) == json.dumps(arguments)


def test_golden_videos() -> None:
    """A video in files, one by hash, and experts asked for: by hand, as above."""
    request = RolloutRequest(
        "g",
        TextPrompt("x"),
        (
            MediaItem(b"", modality=Modality.VIDEO, frames=Frames((b"ab", b"c")), frames_per_second=1.5),
            MediaItem(HASH, modality=Modality.VIDEO),
        ),
        return_routed_experts=True,
    )
    message = wire.request_to_proto(request)
    encoded = message.SerializeToString(deterministic=True).hex()
    frames = "3a 07 0a02 6162 0a01 63"  # 7: { 1: files }
    assert f"2a 14 0802 {frames} 41 000000000000f83f".replace(" ", "") in encoded  # 8: frames_per_second, a double
    assert "2a240802 1220".replace(" ", "") + HASH.hex() in encoded
    assert encoded.endswith("3a021001")  # 7: returns { 2: routed_experts }
    assert wire.request_from_proto(message) == request


def test_the_hash_of_frames_is_the_documented_one() -> None:
    """By the words of the proto file; where a file ends is part of it."""
    files = [b"ab", b"c"]
    expected = hashlib.sha256(b"frames 2\n" + b"".join(hashlib.sha256(file).digest() for file in files)).digest()
    assert frames_hash(Frames(tuple(files))) == media_hash(Frames(tuple(files))) == expected
    assert frames_hash(Frames((b"a", b"bc"))) != expected


def test_golden_completion() -> None:
    expected = (
        "12 39 0a 37"  # GenerateResponse 2: completions { 1: items
        "0a 07" + b"g1/0/a1".hex() +  # 1: trajectory_id; index 0 is the default and not sent
        "1a 03 07ac02"  # 3: token_ids
        "22 08 000000bf 000000c0"  # 4: logprobs
        "28 01"  # 5: STOP
        "32 04 0803 1801 32 06 0804 1001 1802"  # 6: spans
        "3a 0a 0d 0000803e 15 0000003f"  # 7: timing
        "52 01 37"  # 10: text
    )  # fmt: skip
    assert wire.response_to_proto([COMPLETION]).SerializeToString(deterministic=True).hex() == expected.replace(" ", "")


def test_round_trips() -> None:
    assert wire.request_from_proto(wire.request_to_proto(REQUEST)) == REQUEST
    for prompt in (TextPrompt("hi <image>"), TokenPrompt((1, 2)), TokenPrompt((1, 2, 2), (PlaceholderRange(1, 2),))):
        request = dataclasses.replace(REQUEST, prompt=prompt)
        assert wire.request_from_proto(wire.request_to_proto(request)) == request
    info = ServerInfo("a", "m", "arch", "vllm", "0.32", "0.1", 5, ServerLimits(1, 2, 3, 4, 5, 6, 7, 8, 9, 10), (8, 9))
    assert wire.server_info_from_proto(wire.server_info_to_proto(info)) == info


def test_responses_round_trip() -> None:
    info = wire.response_from_proto(wire.response_to_proto(INFO))
    assert isinstance(info, PromptInfo)
    assert info.expanded_ids.dtype == np.int32
    assert info.expanded_ids.tolist() == [1, 2, 2, 300]
    assert info.unexpanded_ids.tolist() == [1, 2]
    arrays = {"unexpanded_ids": INFO.unexpanded_ids, "expanded_ids": INFO.expanded_ids}
    assert dataclasses.replace(info, **arrays) == INFO
    completions = wire.response_from_proto(wire.response_to_proto([COMPLETION, COMPLETION]))
    assert isinstance(completions, list)
    assert len(completions) == 2
    for completion in completions:
        assert (completion.token_ids.dtype, completion.logprobs.dtype) == (np.int32, np.float32)
        assert completion.token_ids.tolist() == [7, 300]
        assert completion.logprobs.tolist() == [-0.5, -2.0]
        assert (
            dataclasses.replace(completion, token_ids=COMPLETION.token_ids, logprobs=COMPLETION.logprobs) == COMPLETION
        )


def test_what_was_asked_for_round_trips() -> None:
    top = TopLogprobs((5, 7), (-0.5, -1.5))
    tensors = (NamedTensor("pixel_values", Tensor("F32", (2, 1), bytes(8))),)
    info = dataclasses.replace(
        INFO,
        media=(dataclasses.replace(INFO.media[0], processed=tensors),),
        prompt_logprobs=(0.0, -0.5, -1.0, -2.0),
        prompt_top_logprobs=(TopLogprobs(), top, top, TopLogprobs()),
        prompt_logprobs_policy_version=0,
    )
    back = wire.prompt_info_from_proto(wire.prompt_info_to_proto(info))
    assert (back.media, back.prompt_logprobs) == (info.media, info.prompt_logprobs)
    assert back.prompt_top_logprobs == info.prompt_top_logprobs
    assert back.prompt_logprobs_policy_version == 0
    for stop in (None, 0, 17, "", "end"):
        completion = dataclasses.replace(
            COMPLETION,
            top_logprobs=(top, TopLogprobs()),
            stop=stop,
            beam=BeamScore(-2.5, -0.625),
            finish_reason=FinishReason.REPETITION,
        )
        found = wire.completion_from_proto(wire.completion_to_proto(completion))
        assert (found.top_logprobs, found.beam) == (completion.top_logprobs, completion.beam)
        assert found.finish_reason is FinishReason.REPETITION
        assert found.stop == stop
        assert type(found.stop) is type(stop)
    experts = Tensor("I16", (5, 2, 2), bytes(range(40)))
    found = wire.completion_from_proto(
        wire.completion_to_proto(dataclasses.replace(COMPLETION, routed_experts=experts))
    )
    assert found.routed_experts == experts


def test_an_empty_request_means_the_documented_defaults() -> None:
    message = pb.GenerateRequest(group_id="g", text="hi")
    assert wire.request_from_proto(message) == RolloutRequest("g", TextPrompt("hi"))
    # Greedy is not "unset".
    message.sampling.temperature = 0.0
    assert wire.request_from_proto(message).sampling.temperature == 0.0
