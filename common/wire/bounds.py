"""How much structure a message may have, measured in its bytes before it is parsed.

Two bytes on the wire can be an empty message in a list, which takes eighty bytes once it is parsed and more as a Python
object. So a limit that leaves room for images would let a message without any fill the memory. Whoever takes messages
from a socket looks first: the contents of `bytes` fields are skipped, and what is left has a limit of its own.
"""

import contextlib
import functools
from collections.abc import Iterator, Sized
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from common.errors import InvalidRequest, TooLarge

# The manifest of a model with a hundred thousand parameters; a context of two million ids.
MAX_STRUCTURE_BYTES = 2**23
# Of messages that hold `bytes` somewhere: media items and their tensors.
MAX_FIELDS = 2**13
# What a field is that holds none of those messages: `bytes`, and anything else.
_CONTENT, _PLAIN = None, 0
_FIXED_BYTES = {1: 8, 5: 4}  # by wire type


def check_bounds(data: bytes, descriptor: Descriptor) -> None:
    """Measure a serialized message. What is no message passes: the parser will say.

    Raises TooLarge for more than `MAX_STRUCTURE_BYTES` outside `bytes` fields, or more than `MAX_FIELDS`.
    """
    num_fields, num_bytes = 0, len(data)
    parts = [(0, len(data), descriptor)]
    while parts:
        with contextlib.suppress(IndexError):  # ends within a number
            for start, end, kind in _fields(data, *parts.pop()):
                num_fields += 1
                if num_fields > MAX_FIELDS:
                    raise TooLarge("", f"more than {MAX_FIELDS} fields")
                if kind is _CONTENT:
                    num_bytes -= end - start
                elif kind is not _PLAIN:
                    parts.append((start, end, kind))
    if num_bytes > MAX_STRUCTURE_BYTES:
        raise TooLarge("", f"{num_bytes} bytes beside media and tensors; the limit is {MAX_STRUCTURE_BYTES}")


def check_count(items: Sized, field: str, limit: int) -> None:
    """Before Python objects are made of them. Raises InvalidRequest for more than `limit`."""
    if len(items) > limit:
        raise InvalidRequest(field, f"{len(items)} items; the limit is {limit}")


def _fields(data: bytes, position: int, end: int, message: Descriptor) -> Iterator[tuple[int, int, Any]]:
    """Where each field of a message begins and ends, and what it is.

    A group is no field of ours: all in it is skipped, as the parser does. Raises IndexError.
    """
    inner, num_open_groups = _inner(message), 0
    while position < end:
        tag, position = _varint(data, position)
        start = position
        kind: Descriptor | int | None = _PLAIN
        match tag & 7:
            case 0:
                _, position = _varint(data, position)
            case 2:
                size, start = _varint(data, position)
                position = start + size
                kind = _PLAIN if num_open_groups else inner.get(tag >> 3, _PLAIN)
            case 3:
                num_open_groups += 1
            case 4:
                num_open_groups -= 1
            case wire_type:
                position += _FIXED_BYTES.get(wire_type, len(data))
        yield start, min(position, end), kind


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise IndexError


@functools.cache
def _inner(descriptor: Descriptor) -> dict[int, Descriptor | None]:
    """By number: `bytes` fields, as None, and messages with such a field in them."""
    inner: dict[int, Descriptor | None] = {}
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_BYTES:
            inner[field.number] = _CONTENT
        elif field.message_type is not None and _inner(field.message_type):
            inner[field.number] = field.message_type
    return inner
