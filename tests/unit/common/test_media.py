import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.errors import InvalidRequest, TooLarge
from common.media import ImageHeader, check_image, content_hash, decode_image

PIXELS = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)


def _encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixel: by hand, after the PNG specification."""
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def test_lossless_formats_give_the_same_pixels() -> None:
    image = Image.fromarray(PIXELS)
    for data in (_encode(image, "PNG"), _encode(image, "WEBP", lossless=True)):
        decoded = decode_image(data, "f", 1000)
        assert decoded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(decoded), PIXELS)


def test_header_and_hash() -> None:
    data = _encode(Image.fromarray(PIXELS), "JPEG")
    assert check_image(data, "f", 35) == ImageHeader("JPEG", width=7, height=5)
    assert content_hash(data) == hashlib.sha256(data).digest()


def test_grey_and_palette_become_rgb() -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    expected = np.repeat(PIXELS[..., :1], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(decode_image(_encode(grey, "PNG"), "f", 1000)), expected)
    palette = grey.convert("P")
    np.testing.assert_array_equal(np.asarray(decode_image(_encode(palette, "PNG"), "f", 1000)), expected)


def test_too_many_pixels_are_refused_by_the_header_alone() -> None:
    with pytest.raises(TooLarge, match=r"^media\[0\]\.encoded: 7x5 pixels, more than the limit of 34$"):
        decode_image(_encode(Image.fromarray(PIXELS), "PNG"), "media[0].encoded", 34)
    for size in (20_000, 2**31 - 1):  # Pillow's own warning, and its own error
        with pytest.raises(TooLarge):
            check_image(_png_header(size, size), "f", 10**6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "f: not an image in PNG, JPEG or WebP format"),
        (b"GIF89a" + bytes(100), "f: not an image in PNG, JPEG or WebP format"),
        (_encode(Image.fromarray(PIXELS), "BMP"), "f: not an image in PNG, JPEG or WebP format"),
        (_encode(Image.fromarray(PIXELS), "PNG")[:-40], "f: damaged PNG file: OSError"),
        (_png_header(7, 5), "f: damaged PNG file: OSError"),
        (
            _encode(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG"),
            "f: pixels of mode I;16; convert the image to 8 bits per channel",
        ),
        (
            _encode(Image.fromarray(PIXELS), "WEBP", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]),
            "f: an animation; send its frames as single images",
        ),
    ],
    ids=["empty", "gif", "bmp", "cut", "no pixels", "16 bit", "animation"],
)
def test_what_is_no_good_image_names_the_field(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        decode_image(data, "f", 1000)
    assert str(raised.value) == message
