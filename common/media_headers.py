"""How much there is in an image file beside its pixels, before PIL looks at it.

PIL walks the segments of a JPEG and the chunks of a PNG in Python and keeps most of them, libwebp does so with the
chunks of a WebP. Four bytes can be a segment: a file of 32 MiB would take a minute and a GiB before its size is known.
"""

import itertools
from collections.abc import Iterator

from PIL.JpegImagePlugin import MARKER

from common.errors import InvalidRequest

# Room for a color profile of the greatest size that a JPEG can have, in its 255 segments.
_MAX_PARTS = 300


def check_parts(data: bytes, field: str) -> None:
    """Raises InvalidRequest for a file of too many parts. What is no image passes: the decoder will say."""
    for magic, parts_of in ((b"\xff\xd8", _segments), (b"\x89PNG\r\n\x1a\n", _png_chunks), (b"RIFF", _webp_chunks)):
        if data.startswith(magic) and any(True for _ in itertools.islice(parts_of(data), _MAX_PARTS, None)):
            raise InvalidRequest(
                field, f"more than {_MAX_PARTS} segments or chunks beside the pixels; save the image without metadata"
            )


def _segments(data: bytes) -> Iterator[int]:
    """Where PIL takes a step on its way to the pixels of a JPEG: at each segment, and each byte that is in none."""
    position = 2
    while position + 1 < len(data):
        yield position
        marker = int.from_bytes(data[position : position + 2])
        if marker == 0xFFDA:
            return
        _, _, reader = MARKER.get(marker, ("", "", None))
        if reader is not None:
            position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4]))
        else:
            position += 1 if data[position] != 0xFF or marker == 0xFFFF else 2


def _png_chunks(data: bytes) -> Iterator[int]:
    """The chunks before the pixels of a PNG."""
    position = 8
    while position < len(data) and data[position + 4 : position + 8] != b"IDAT":
        yield position
        position += 12 + int.from_bytes(data[position : position + 4])


def _webp_chunks(data: bytes) -> Iterator[int]:
    """All chunks of a WebP: its decoder looks at those behind the pixels too."""
    position, end = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while position < end:
        yield position
        num_bytes = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + num_bytes + num_bytes % 2
