"""What a message may hold is measured before it is parsed."""

import pytest
from google.protobuf.message import Message

from common.errors import InvalidRequest, OutriderError, TooLarge
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.pb.weights.v1 import weights_pb2
from common.wire import check_bounds, request_from_proto
from common.wire.bounds import MAX_FIELDS, MAX_STRUCTURE_BYTES


def length_delimited(number: int, data: bytes) -> bytes:
    """One field of a message, written by hand."""
    size, varint = len(data), bytearray()
    while size > 0x7F:
        varint.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *varint, size]) + data


EMPTY_MESSAGES = b"\x0a\x00"  # field 1, length 0
MANY_TENSORS = pb.GenerateRequest(
    media=[pb.MediaItem(processed=pb.ProcessedMedia(tensors=[pb.NamedTensor()] * MAX_FIELDS))]
).SerializeToString()


@pytest.mark.parametrize(
    "message",
    [
        pb.GenerateRequest(),
        pb.GenerateRequest(text="x" * (MAX_STRUCTURE_BYTES - 100)),
        pb.GenerateRequest(media=[pb.MediaItem(encoded=bytes(2 * MAX_STRUCTURE_BYTES), sha256=bytes(32))]),
        pb.GenerateRequest(
            media=[pb.MediaItem(pixels=pb.Tensor(shape=[1, 2, 3], data=bytes(MAX_STRUCTURE_BYTES)))] * 2
        ),
        pb.GenerateRequest(
            media=[
                pb.MediaItem(
                    processed=pb.ProcessedMedia(
                        tensors=[pb.NamedTensor(name="x", tensor=pb.Tensor(data=bytes(MAX_STRUCTURE_BYTES)))] * 3
                    )
                )
            ]
        ),
        pb.GenerateRequest(media=[pb.MediaItem()] * MAX_FIELDS),
        pb.PutMediaRequest(chunk=bytes(2**20)),
        weights_pb2.StageRequest(
            manifest=weights_pb2.Manifest(
                parameters=[weights_pb2.Parameter(name=f"layers.{i}.weight", shape=[1, 2]) for i in range(100_000)]
            )
        ),
    ],
)
def test_honest_messages_pass(message: Message) -> None:
    check_bounds(message.SerializeToString(), message.DESCRIPTOR)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x2a\x00" * (MAX_FIELDS + 1), "more than 8192 fields"),  # media
        (length_delimited(2, EMPTY_MESSAGES * (MAX_STRUCTURE_BYTES // 2)), "bytes beside media and tensors"),
        (length_delimited(4, length_delimited(1, b"\x05" * (MAX_STRUCTURE_BYTES + 1))), "bytes beside media"),
        # A field that nobody knows, and one that promises more bytes than there are.
        (length_delimited(15, bytes(MAX_STRUCTURE_BYTES + 1)), "bytes beside media"),
        (
            length_delimited(2, EMPTY_MESSAGES * (MAX_STRUCTURE_BYTES // 2))
            + b"\x2a\xff\xff\xff\x7f\x1a\xff\xff\xff\x7e",
            "bytes beside media",
        ),
        # Within a group, which the parser reads through.
        (b"\x7b" + length_delimited(2, EMPTY_MESSAGES * (MAX_STRUCTURE_BYTES // 2)) + b"\x7c", "bytes beside media"),
        (MANY_TENSORS + length_delimited(5, b"\x80"), "more than 8192 fields"),  # a damaged part ends only itself
        # A length of two bytes; numbers of any length, of eight and of four bytes: what follows is measured where the
        # parser finds it.
        (length_delimited(3, bytes(200)) + MANY_TENSORS, "more than 8192 fields"),
        (b"\x78\xff\x01" + MANY_TENSORS, "more than 8192 fields"),
        (b"\x79" + bytes(8) + MANY_TENSORS, "more than 8192 fields"),
        (b"\x7d" + bytes(4) + MANY_TENSORS, "more than 8192 fields"),
        # What is in a group is no field of ours: it is skipped by its length, here behind and before what counts.
        (MANY_TENSORS + b"\x7b" + length_delimited(5, b"\x80") + b"\x7c", "more than 8192 fields"),
        (b"\x7b\x7b\x7c" + length_delimited(5, b"\x80") + b"\x7c" + MANY_TENSORS, "more than 8192 fields"),
        (
            b"\x7b" + length_delimited(5, length_delimited(2, bytes(MAX_STRUCTURE_BYTES))) + b"\x7c",
            "bytes beside media",
        ),
    ],
)
def test_what_would_fill_the_memory_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(TooLarge, match=problem):
        check_bounds(data, pb.GenerateRequest.DESCRIPTOR)


@pytest.mark.parametrize("data", [b"\xff", b"\x0a", b"\x0a\x80", b"\x80" * 20, b"\x06", b"\x09\0", b"\x2a\x05\x1a\xff"])
def test_what_is_no_message_is_left_to_the_parser(data: bytes) -> None:
    check_bounds(data, pb.GenerateRequest.DESCRIPTOR)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (length_delimited(2, EMPTY_MESSAGES * 5000), "chat.messages"),
        (length_delimited(2, length_delimited(1, b"\x12\x00" * 5000)), "chat.messages[0].parts"),
        (length_delimited(4, b"\x12\x00" * 5000), "tokens.placeholders"),
        (length_delimited(4, length_delimited(1, b"\x05" * (2**21 + 1))), "tokens.ids"),
        (b"\x1a\x01x" + b"\x2a\x00" * 5000, "media"),
        (b"\x1a\x01x" + length_delimited(6, b"\x52\x00" * (2**20 + 1)), "sampling.stop"),
    ],
)
def test_lists_are_counted_before_anything_is_made_of_them(data: bytes, field: str) -> None:
    with pytest.raises(OutriderError, match="items; the limit is") as raised:
        request_from_proto(pb.GenerateRequest.FromString(data))
    assert isinstance(raised.value, InvalidRequest)
    assert raised.value.field == field
