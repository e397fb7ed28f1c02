"""How much there is in an image file beside its pixels, before PIL looks at it.

PIL walks the segments of a JPEG and the chunks of a PNG in Python and keeps most of them, libwebp does so with the
chunks of a WebP. Four bytes can be a segment: a file of 32 MiB would take a minute and a GiB before its size is known.

A JPEG may send its pixels in many scans, and the decoder walks the whole picture for each: with the shortest, of 33
bytes, a MiB would take it minutes at 16 megapixels.
"""

import itertools
import re
from collections.abc import Iterator

from PIL.JpegImagePlugin import MARKER

from common.errors import InvalidRequest

# Room for a color profile of the greatest size that a JPEG can have, in its 255 segments.
_MAX_PARTS = 300
# Encoders write ten; at 16 megapixels each takes 15 ms and more.
_MAX_SCANS = 64
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
# What ends the pixels of a scan: 0xFF that is no value of theirs (00), restart (D0 to D7) or fill (FF).
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# An IDAT with as many bytes is worth the step: encoders write 8 KiB and more into each, except the last.
_MIN_IDAT_BYTES = 256


def check_parts(data: bytes, field: str) -> None:
    """Raises InvalidRequest for a file of too many parts or scans. What is no image passes: the decoder will say."""
    for magic, parts_of in ((b"\xff\xd8", _segments), (b"\x89PNG\r\n\x1a\n", _png_chunks), (b"RIFF", _webp_chunks)):
        if data.startswith(magic) and any(True for _ in itertools.islice(parts_of(data), _MAX_PARTS, None)):
            raise InvalidRequest(
                field,
                f"more than {_MAX_PARTS} segments or chunks beside the pixels; "
                "send an image without metadata, and an animation as single images",
            )
    if data.startswith(b"\xff\xd8"):
        num_scans = sum(data.startswith(_START_OF_SCAN, position) for position in _segments(data))
        if num_scans > _MAX_SCANS:
            raise InvalidRequest(field, f"{num_scans} scans, more than the limit of {_MAX_SCANS}; save the image again")


def _segments(data: bytes) -> Iterator[int]:
    """Where PIL takes a step on its way to the pixels of a JPEG: at each segment, and each byte that is in none.

    And where its decoder takes one behind them, up to the end of the picture: there may be another file behind that.
    """
    position = 2
    while position + 1 < len(data):
        yield position
        marker = int.from_bytes(data[position : position + 2])
        if marker == 0xFFDA:
            break
        _, _, reader = MARKER.get(marker, ("", "", None))
        if reader is not None:
            position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4]))
        else:
            position += 1 if data[position] != 0xFF or marker == 0xFFFF else 2
    position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4]))
    while (found := _MARKER.search(data, position)) is not None and found.group() != _END_OF_IMAGE:
        yield found.start()
        position = found.end()
        if found.group() != b"\xff\x01":  # the one that has no length
            position += max(2, int.from_bytes(data[position : position + 2]))


def _png_chunks(data: bytes) -> Iterator[int]:
    """All chunks of a PNG but those with many pixels: PIL walks what is behind the pixels when it decodes."""
    position = 8
    while position < len(data) and (kind := data[position + 4 : position + 8]) != b"IEND":
        num_bytes = int.from_bytes(data[position : position + 4])
        if kind != b"IDAT" or num_bytes < _MIN_IDAT_BYTES:
            yield position
        position += 12 + num_bytes


def _webp_chunks(data: bytes) -> Iterator[int]:
    """All chunks of a WebP: its decoder looks at those behind the pixels too."""
    position, end = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while position < end:
        yield position
        num_bytes = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + num_bytes + num_bytes % 2
