"""What the codec of rollouts refuses: requests by the name of their field, and answers that are not whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import wire
from common.errors import InvalidRequest, MalformedResponse, OutriderError
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.types import PlaceholderRange, PromptInfo

HASH = bytes(range(32))
IMAGE = pb.MODALITY_IMAGE


def _item(**values: object) -> pb.GenerateRequest:
    media = [pb.MediaItem(modality=pb.MODALITY_IMAGE, sha256=HASH), pb.MediaItem(**values)]  # type: ignore[arg-type]
    return pb.GenerateRequest(text="hi", media=media)


def _arguments(text: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.ChatPrompt(template_arguments=text))


def _tensor(**values: object) -> pb.Tensor:
    return pb.Tensor(**({"dtype": pb.DTYPE_UINT8, "shape": [1, 2, 3], "data": bytes(6)} | values))  # type: ignore[arg-type]


def _processed(*names: str) -> pb.GenerateRequest:
    tensors = [pb.NamedTensor(name=name, tensor=_tensor()) for name in names]
    return _item(modality=IMAGE, processed=pb.ProcessedMedia(tensors=tensors))


@pytest.mark.parametrize(
    ("message", "code", "field"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "prompt"),
        (
            pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage(), pb.ChatMessage(parts=[pb.ChatPart()])])),
            "INVALID_ARGUMENT",
            "chat.messages[1].parts[0]",
        ),
        (_arguments('{"tokenize": true}'), "INVALID_ARGUMENT", "chat.template_arguments"),
        (_arguments('{"x": NaN}'), "INVALID_ARGUMENT", "chat.template_arguments"),
        (_arguments("[" * 2**16), "INVALID_ARGUMENT", "chat.template_arguments"),
        (_item(encoded=b"x"), "INVALID_ARGUMENT", "media[1].modality"),
        (_item(modality=7, encoded=b"x"), "INVALID_ARGUMENT", "media[1].modality"),
        (_item(modality=IMAGE), "INVALID_ARGUMENT", "media[1].content"),
        (_item(modality=IMAGE, sha256=b"short"), "INVALID_ARGUMENT", "media[1].sha256"),
        (_item(modality=pb.MODALITY_VIDEO, encoded=b"x"), "INVALID_ARGUMENT", "media[1].encoded"),
        (_item(modality=IMAGE, frames=pb.EncodedFrames(files=[b"x"])), "INVALID_ARGUMENT", "media[1].frames"),
        (_item(modality=IMAGE, sha256=HASH, frames_per_second=2), "INVALID_ARGUMENT", "media[1].frames_per_second"),
        (_item(modality=pb.MODALITY_VIDEO), "INVALID_ARGUMENT", "media[1].content"),
        (_item(modality=IMAGE, pixels=pb.Tensor()), "INVALID_ARGUMENT", "media[1].pixels.dtype"),
        (_item(modality=IMAGE, pixels=_tensor(dtype=99)), "INVALID_ARGUMENT", "media[1].pixels.dtype"),
        (_item(modality=IMAGE, pixels=_tensor(shape=[2, -1, 3])), "INVALID_ARGUMENT", "media[1].pixels.shape"),
        (_item(modality=IMAGE, pixels=_tensor(shape=[1] * 9)), "INVALID_ARGUMENT", "media[1].pixels.shape"),
        (_item(modality=IMAGE, pixels=_tensor(data=bytes(5))), "INVALID_ARGUMENT", "media[1].pixels.data"),
        (_item(modality=IMAGE, pixels=_tensor(data=b"")), "INVALID_ARGUMENT", "media[1].pixels.data"),
        # A product that does not fit into 64 bits is not 0.
        (
            _item(modality=IMAGE, pixels=_tensor(shape=[2**32, 2**32], data=b"")),
            "INVALID_ARGUMENT",
            "media[1].pixels.data",
        ),
        # No elements, and a size that no array has.
        (
            _item(modality=IMAGE, pixels=_tensor(shape=[0, 2**62, 2], data=b"")),
            "INVALID_ARGUMENT",
            "media[1].pixels.shape",
        ),
        (
            _item(modality=IMAGE, pixels=_tensor(dtype=pb.DTYPE_BOOL, data=b"\0\1\0\1\0\2")),
            "INVALID_ARGUMENT",
            "media[1].pixels.data",
        ),
        (_item(modality=IMAGE, processed=pb.ProcessedMedia()), "INVALID_ARGUMENT", "media[1].processed.tensors"),
        (_processed("pixel values"), "INVALID_ARGUMENT", "media[1].processed.tensors[0].name"),
        (_processed(""), "INVALID_ARGUMENT", "media[1].processed.tensors[0].name"),
        (_processed("größe"), "INVALID_ARGUMENT", "media[1].processed.tensors[0].name"),
        (_processed("a" * 128, "a" * 129), "INVALID_ARGUMENT", "media[1].processed.tensors[1].name"),
        (_processed("a", "a"), "INVALID_ARGUMENT", "media[1].processed.tensors[1].name"),
        (_processed(*(f"t{i}" for i in range(65))), "INVALID_ARGUMENT", "media[1].processed.tensors"),
        (
            pb.GenerateRequest(text="x", sampling=pb.SamplingParams(structured_output=pb.StructuredOutput())),
            "INVALID_ARGUMENT",
            "sampling.structured_output",
        ),
        (
            pb.GenerateRequest(
                text="x", sampling=pb.SamplingParams(structured_output=pb.StructuredOutput(json_object=False))
            ),
            "INVALID_ARGUMENT",
            "sampling.structured_output.json_object",
        ),
        (
            pb.GenerateRequest(text="x", sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))),
            "INVALID_ARGUMENT",
            "sampling.logit_bias",
        ),
    ],
)
def test_a_refused_request_names_the_field(message: pb.GenerateRequest, code: str, field: str) -> None:
    with pytest.raises(OutriderError) as raised:
        wire.request_from_proto(message)
    assert (raised.value.code.name, raised.value.field) == (code, field)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "broken",
    [
        pb.GenerateResponse(),
        pb.GenerateResponse(completions=pb.Completions(items=[pb.Completion(token_ids=[1], finish_reason=1)])),
        pb.GenerateResponse(completions=pb.Completions(items=[pb.Completion(finish_reason=0)])),
        pb.GenerateResponse(completions=pb.Completions(items=[pb.Completion(finish_reason=9)])),
        pb.GenerateResponse(
            prompt=pb.PromptInfo(
                expanded_ids=[1, 2],
                media=[pb.MediaUse(sha256=HASH, modality=1, placeholder=pb.PlaceholderRange(offset=1, length=2))],
            )
        ),
        pb.GenerateResponse(prompt=pb.PromptInfo(media=[pb.MediaUse(sha256=b"short", modality=1)])),
        pb.GenerateResponse(prompt=pb.PromptInfo(expanded_ids=[1, 2], prompt_logprobs=[0.0])),
        pb.GenerateResponse(
            prompt=pb.PromptInfo(expanded_ids=[1], prompt_top_logprobs=[pb.TopLogprobs(token_ids=[1])])
        ),
        pb.GenerateResponse(
            prompt=pb.PromptInfo(
                media=[
                    pb.MediaUse(sha256=HASH, modality=1, processed=[pb.NamedTensor(name="x", tensor=_tensor(data=b""))])
                ]
            )
        ),
        pb.GenerateResponse(
            completions=pb.Completions(
                items=[
                    pb.Completion(
                        token_ids=[1, 2],
                        logprobs=[0, 0],
                        finish_reason=1,
                        version_spans=[pb.VersionSpan(end=2)],
                        top_logprobs=[pb.TopLogprobs()],
                    )
                ]
            )
        ),
        pb.GenerateResponse(prompt=pb.PromptInfo(media=[pb.MediaUse(sha256=HASH)])),
        *(
            pb.GenerateResponse(
                completions=pb.Completions(
                    items=[
                        pb.Completion(
                            token_ids=[1, 2, 3],
                            logprobs=[0, 0, 0],
                            finish_reason=1,
                            version_spans=[pb.VersionSpan(end=3)],
                            routed_experts=experts,
                        )
                    ]
                )
            )
            for experts in (
                pb.Tensor(),
                pb.Tensor(dtype=pb.DTYPE_INT16, shape=[1, 1, 1], data=bytes(2)),  # of fewer tokens
                pb.Tensor(dtype=pb.DTYPE_INT16, shape=[2, 1, 1], data=bytes(2)),
                pb.Tensor(dtype=pb.DTYPE_INT16, shape=[2, 1], data=bytes(4)),
                pb.Tensor(dtype=pb.DTYPE_INT64, shape=[2, 1, 1], data=bytes(16)),
            )
        ),
    ],
)
def test_a_malformed_response(broken: pb.GenerateResponse) -> None:
    with pytest.raises(MalformedResponse):
        wire.response_from_proto(broken)


def test_an_image_may_end_with_the_prompt() -> None:
    use = pb.MediaUse(sha256=HASH, modality=1, num_tokens=2, placeholder=pb.PlaceholderRange(offset=1, length=2))
    info = wire.response_from_proto(pb.GenerateResponse(prompt=pb.PromptInfo(expanded_ids=[1, 2, 2], media=[use])))
    assert isinstance(info, PromptInfo)
    assert info.media[0].placeholder == PlaceholderRange(1, 2)


@pytest.mark.parametrize("spans", [[], [(0, 1)], [(0, 1), (0, 2)], [(1, 2)], [(0, 2), (2, 2)], [(0, 3)]])
def test_spans_must_cover_the_tokens(spans: list[tuple[int, int]]) -> None:
    message = pb.Completion(token_ids=[7, 300], logprobs=[-0.5, -2.0], finish_reason=1)
    message.version_spans.extend(pb.VersionSpan(start=start, end=end) for start, end in spans)
    with pytest.raises(MalformedResponse, match="version_spans"):
        wire.completion_from_proto(message)


def test_no_policy_has_a_version_below_0() -> None:
    message = pb.Completion(token_ids=[7], logprobs=[-0.5], finish_reason=1)
    message.version_spans.add(policy_version=-1, start=0, end=1)
    with pytest.raises(MalformedResponse, match="policy version -1"):
        wire.completion_from_proto(message)


@given(
    st.integers(-1, 11),
    st.lists(st.one_of(st.integers(-1, 4), st.integers(-(2**63), 2**63 - 1)), max_size=9),
    st.binary(max_size=64),
)
def test_a_tensor_is_taken_only_if_it_adds_up(dtype: int, shape: list[int], data: bytes) -> None:
    message = pb.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]
    try:
        tensor = wire.tensor_from_proto(message, "x")
    except InvalidRequest:
        return
    assert wire.tensor_to_proto(tensor) == message
    assert tensor.widened().shape == tuple(shape)
    assert tensor.dtype == "BF16" or tensor.array().nbytes == len(data)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_request_decoder(data: bytes) -> None:
    message = pb.GenerateRequest()
    try:
        message.ParseFromString(data)
    except Exception:  # noqa: BLE001 - protobuf's DecodeError: the bytes are no message at all
        return
    try:
        request = wire.request_from_proto(message)
    except OutriderError:
        return
    assert isinstance(request.group_id, str)
