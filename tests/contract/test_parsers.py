"""Properties of everything that parses foreign bytes: what is encoded comes back, and noise is a typed error."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from actor.validation.request import check_request
from common import wire
from common.config import ConfigError, load_config
from common.errors import (
    DETAILS_KEY,
    InvalidRequest,
    MalformedResponse,
    OutriderError,
    PermissionDenied,
    TooLarge,
    Unimplemented,
    from_rpc_error,
    to_status,
)
from common.media import check_image, decode_image
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.pb.weights.v1 import weights_pb2
from common.rpc.server import join_address, split_address
from common.rpc.tls import LEARNER, READER, authorize, read_certificates
from common.types import ServerLimits
from common.wire.tensors import named_tensors_from_proto, named_tensors_to_proto
from learner.config import LearnerConfig
from tests.helpers import wire_strategies as wires

MAX_PIXELS = 4096


def plain(value: Any) -> Any:
    """Something that can be compared, also where there are arrays in it."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tolist()
    if dataclasses.is_dataclass(value):
        return type(value), {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def crossed(message: Message) -> Any:
    """What the other end parses."""
    data = message.SerializeToString()
    wire.check_bounds(data, message.DESCRIPTOR)
    return type(message).FromString(data)


# ------------------------------------------------------------------------------------------- there and back


@given(wires.rollout_requests)
def test_requests_come_back(request: Any) -> None:
    assert wire.request_from_proto(crossed(wire.request_to_proto(request))) == request


@given(wires.prompt_infos())
def test_prompt_infos_come_back(info: Any) -> None:
    assert plain(wire.response_from_proto(crossed(wire.response_to_proto(info)))) == plain(info)


@given(st.lists(wires.completions(), max_size=3))
def test_completions_come_back(completions: Any) -> None:
    assert plain(wire.response_from_proto(crossed(wire.response_to_proto(completions)))) == plain(completions)


@given(wires.named_tensors)
def test_tensors_come_back(tensors: Any) -> None:
    messages = [crossed(message) for message in named_tensors_to_proto(tensors)]
    assert named_tensors_from_proto(messages, "x") == tensors


@given(wires.manifests())
def test_manifests_come_back(manifest: Any) -> None:
    assert wire.manifest_from_proto(crossed(wire.manifest_to_proto(manifest))) == manifest


@given(wires.epochs())
def test_epochs_come_back(epoch: Any) -> None:
    assert wire.epoch_from_proto(crossed(wire.epoch_to_proto(epoch))) == epoch


@given(wires.statuses)
def test_statuses_come_back(status: Any) -> None:
    assert wire.status_from_proto(crossed(wire.status_to_proto(status))) == status


@given(wires.server_infos)
def test_server_infos_come_back(info: Any) -> None:
    assert wire.server_info_from_proto(crossed(wire.server_info_to_proto(info))) == info


# ------------------------------------------------------------------------------------------- noise is a typed error

NOISE = st.binary(max_size=200)


def near(strategy: st.SearchStrategy[Any], encode: Callable[[Any], Message]) -> st.SearchStrategy[bytes]:
    """Noise, and good messages that were damaged on the way."""
    return NOISE | strategy.flatmap(lambda value: wires.damaged(encode(value).SerializeToString()))


def parsed(message_class: Any, data: bytes) -> Any:
    """As a server does; None for what is no message."""
    wire.check_bounds(data, message_class.DESCRIPTOR)
    try:
        return message_class.FromString(data)
    except DecodeError:
        return None


@given(near(wires.rollout_requests, wire.request_to_proto))
def test_a_request_is_taken_or_refused(data: bytes) -> None:
    try:
        message = parsed(pb.GenerateRequest, data)
        if message is None:
            return
        request = wire.request_from_proto(message)
        check_request(request, ServerLimits(max_context_tokens=64), 320, (1,))
    except (InvalidRequest, TooLarge, Unimplemented):
        return
    assert wire.request_from_proto(wire.request_to_proto(request)) == request


@pytest.mark.parametrize(
    ("message_class", "decode", "strategy"),
    [
        (weights_pb2.Manifest, wire.manifest_from_proto, near(wires.manifests(), wire.manifest_to_proto)),
        (weights_pb2.OpenEpochRequest, wire.epoch_from_proto, near(wires.epochs(), wire.epoch_to_proto)),
        (pb.Tensor, lambda message: wire.tensor_from_proto(message, "x"), near(wires.tensors(), wire.tensor_to_proto)),
    ],
)
@given(data=st.data())
def test_weights_and_tensors_are_taken_or_refused(message_class: Any, decode: Any, strategy: Any, data: Any) -> None:
    message = parsed(message_class, data.draw(strategy))
    if message is not None:
        _only((InvalidRequest, TooLarge), decode, message)


@pytest.mark.parametrize(
    ("message_class", "decode", "strategy"),
    [
        (pb.GenerateResponse, wire.response_from_proto, near(wires.prompt_infos(), wire.response_to_proto)),
        (pb.Completion, wire.completion_from_proto, near(wires.completions(), wire.completion_to_proto)),
        (pb.GetServerInfoResponse, wire.server_info_from_proto, near(wires.server_infos, wire.server_info_to_proto)),
        (weights_pb2.GetStatusResponse, wire.status_from_proto, near(wires.statuses, wire.status_to_proto)),
    ],
)
@given(data=st.data())
def test_an_answer_is_taken_or_malformed(message_class: Any, decode: Any, strategy: Any, data: Any) -> None:
    message = parsed(message_class, data.draw(strategy))
    if message is not None:
        _only((MalformedResponse,), decode, message)


def _only(allowed: tuple[type[Exception], ...], function: Callable[..., Any], *arguments: Any) -> Any:
    """Its value, or None for an error of these; any other one is the test's."""
    try:
        return function(*arguments)
    except allowed:
        return None


# ------------------------------------------------------------------------------------------- media


def _file(image_format: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (9, 90, 200)).save(buffer, image_format)
    return buffer.getvalue()


@given(
    st.sampled_from(["PNG", "JPEG", "WEBP"]).flatmap(lambda name: wires.damaged(_file(name, (24, 16)))) | NOISE,
)
def test_a_file_is_an_image_within_limits_or_refused(data: bytes) -> None:
    """What the header said is what was decoded, and within the limit."""
    header = _only((InvalidRequest, TooLarge), check_image, data, "x", MAX_PIXELS)
    image = _only((InvalidRequest, TooLarge), decode_image, data, "x", MAX_PIXELS)
    if image is not None:
        assert header is not None
        assert image.mode == "RGB"
        assert image.size == (header.width, header.height)
        assert image.width * image.height <= MAX_PIXELS


@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(1, 100), st.integers(1, 100))
def test_the_limit_on_pixels_is_exact(image_format: str, width: int, height: int) -> None:
    data = _file(image_format, (width, height))
    assert decode_image(data, "x", width * height).size == (width, height)
    with pytest.raises(TooLarge, match=f"{width}x{height} pixels"):
        decode_image(data, "x", width * height - 1)


# ------------------------------------------------------------------------------------------- statuses, names, files


class _Status:
    """Of a call that failed, as grpc has it."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Sequence[tuple[str, bytes]]) -> None:
        self._values = code, details, dict(metadata)

    def code(self) -> grpc.StatusCode:
        return self._values[0]

    def details(self) -> str:
        return self._values[1]

    def trailing_metadata(self) -> dict[str, bytes]:
        return self._values[2]


FAILURES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
GOOD_STATUS = to_status(InvalidRequest("media[1].encoded", "is empty")).SerializeToString()


@given(st.sampled_from(FAILURES), wires.texts, NOISE | wires.damaged(GOOD_STATUS))
def test_every_status_is_an_error_of_ours(code: grpc.StatusCode, details: str, status: bytes) -> None:
    error: Any = _Status(code, details, [(DETAILS_KEY, status)])
    assert isinstance(from_rpc_error(error), OutriderError)


@given(st.text(max_size=60))
def test_an_address_is_one_or_a_mistake(text: str) -> None:
    parts = _only((ConfigError,), split_address, text)
    if parts is not None:
        assert split_address(join_address(*parts)) == parts


@given(st.sets(st.sampled_from([LEARNER, READER, "actor.outrider", "learner.outrider.evil", "*", ""]) | st.text()))
def test_only_the_whole_name_opens_a_door(names: set[str]) -> None:
    assert _may(names, "/weights.v1.WeightService/Commit") == (LEARNER in names)
    assert _may(names, "/rollout.v1.RolloutService/Generate") == (LEARNER in names or READER in names)


def _may(names: set[str], method: str) -> bool:
    try:
        authorize(method, frozenset(names))
    except PermissionDenied:
        return False
    return True


@settings(max_examples=30)
@given(st.tuples(NOISE, NOISE, NOISE))
def test_certificates_that_are_noise(tmp_path_factory: pytest.TempPathFactory, files: tuple[bytes, ...]) -> None:
    directory = tmp_path_factory.mktemp("tls")
    for name, data in zip(("tls.crt", "tls.key", "ca.crt"), files, strict=True):
        (directory / name).write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be used"):
        read_certificates(directory)


def _mistake(load: Callable[[], Any]) -> str:
    try:
        load()
    except ConfigError as error:
        return str(error)
    return ""


_KEYS = st.sampled_from(["model", "trainer", "rollout.n", "data.train", "optimizer.lr", "nonsense"])
_OVERRIDES = st.lists(st.builds("{}={}".format, _KEYS | wires.texts, wires.texts) | wires.texts, max_size=3)


@settings(max_examples=50)
@given(NOISE | wires.texts.map(str.encode), _OVERRIDES)
@example(b"", ["\x1e=1"])
def test_a_configuration_is_one_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, overrides: list[str]
) -> None:
    path = Path(tmp_path_factory.mktemp("config")) / "run.yaml"
    path.write_bytes(text)
    mistake = _mistake(lambda: load_config(LearnerConfig, path, overrides))
    lines = mistake.splitlines()
    assert len(lines) <= 1 or (len(lines) <= 11 and all(line.startswith(f"{path}: ") for line in lines))
