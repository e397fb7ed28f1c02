"""How much structure a message may have, measured in its bytes before it is parsed.

Two bytes on the wire can be an empty message in a list, which takes eighty bytes once it is parsed and more as a Python
object. So a limit that leaves room for images would let a message without any fill the memory. Whoever takes messages
from a socket looks first: the contents of `bytes` fields are skipped, and what is left has a limit of its own.
"""

import functools
from collections.abc import Sized

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from common.errors import InvalidRequest, TooLarge

# The manifest of a model with a hundred thousand parameters; a context of two million ids.
MAX_STRUCTURE_BYTES = 2**23
# Of messages that hold `bytes` somewhere: media items and their tensors.
MAX_FIELDS = 2**13
_CONTENT = None
# By wire type; groups are read through.
_FIXED_BYTES = {1: 8, 5: 4, 3: 0, 4: 0}


def check_bounds(data: bytes, descriptor: Descriptor) -> None:
    """Measure a serialized message. What is no message passes: the parser will say.

    Raises TooLarge for more than `MAX_STRUCTURE_BYTES` outside `bytes` fields, or more than `MAX_FIELDS`.
    """
    num_fields, num_bytes = 0, len(data)
    parts = [(0, len(data), descriptor)]
    try:
        while parts:
            position, end, kind = parts.pop()
            inner = _inner(kind)
            while position < end:
                num_fields += 1
                if num_fields > MAX_FIELDS:
                    raise TooLarge("", f"more than {MAX_FIELDS} fields")
                tag, position = _varint(data, position)
                if tag & 7 == 2:
                    size, position = _varint(data, position)
                    field = inner.get(tag >> 3, kind)
                    if field is _CONTENT:
                        num_bytes -= min(size, end - position)
                    elif field is not kind:
                        parts.append((position, min(position + size, end), field))
                    position += size
                elif tag & 7 == 0:
                    _, position = _varint(data, position)
                else:  # a group is no field of ours: whatever is in it counts as if it were not in one
                    position += _FIXED_BYTES.get(tag & 7, len(data))
    except IndexError:  # ends within a number
        pass
    if num_bytes > MAX_STRUCTURE_BYTES:
        raise TooLarge("", f"{num_bytes} bytes beside media and tensors; the limit is {MAX_STRUCTURE_BYTES}")


def check_count(items: Sized, field: str, limit: int) -> None:
    """Before Python objects are made of them. Raises InvalidRequest for more than `limit`."""
    if len(items) > limit:
        raise InvalidRequest(field, f"{len(items)} items; the limit is {limit}")


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
