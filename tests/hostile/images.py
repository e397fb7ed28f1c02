"""Image files that no decoder should get far with: cut off, bombs, animations, formats that are not taken."""

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, PngImagePlugin

MEGAPIXEL = 2**20


def picture(rng: random.Random, image_format: str = "PNG", size: int = 24) -> bytes:
    """A good file, another one each time."""
    pixels = np.frombuffer(rng.randbytes(size * size * 3), np.uint8).reshape(size, size, 3)
    return _file(Image.fromarray(pixels), image_format)


def truncated(rng: random.Random) -> bytes:
    """At least one byte is there, at least a tenth is missing."""
    data = picture(rng, rng.choice(("PNG", "JPEG", "WEBP")))
    return data[: rng.randint(1, len(data) * 9 // 10)]


def flipped(rng: random.Random) -> bytes:
    """A PNG whose compressed data is damaged."""
    data = bytearray(picture(rng))
    start = data.index(b"IDAT") + 4
    for _ in range(8):
        data[rng.randrange(start, len(data) - 16)] ^= 0xFF
    return bytes(data)


def bomb(rng: random.Random) -> bytes:
    """1 to 100 megapixels in a small file, all of them really there."""
    return _bomb(rng.choice(("PNG", "JPEG")), rng.choice((1, 2, 5, 10, 17, 40, 100)))


@functools.cache
def _bomb(image_format: str, megapixels: int) -> bytes:
    width = height = int((megapixels * MEGAPIXEL) ** 0.5) + 1
    if image_format == "JPEG":
        return _file(Image.new("L", (width, height)), "JPEG")
    row = bytes(1 + (width + 7) // 8)  # one bit per pixel
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def liar(rng: random.Random) -> bytes:
    """A header that promises what no machine has, and nothing behind it."""
    width, height = rng.choice(((2**31 - 1, 2**31 - 1), (65_535, 65_535), (1, 2**31 - 1), (0, 0), (0, 5)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")


@functools.cache
def text_bomb() -> bytes:
    """A picture with compressed text of 64 MiB beside it."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (64 * 2**20), zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def animation(rng: random.Random) -> bytes:
    """Several frames."""
    frames = [Image.new("RGB", (16, 16), (value, 0, rng.randrange(256))) for value in (0, 90, 180)]
    buffer = io.BytesIO()
    frames[0].save(buffer, rng.choice(("PNG", "WEBP")), save_all=True, append_images=frames[1:], duration=40)
    return buffer.getvalue()


def deep(rng: random.Random) -> bytes:
    """16 bits per channel."""
    return _file(Image.fromarray(np.full((8, 8), rng.randrange(2**16), np.uint16)), "PNG")


def foreign(rng: random.Random) -> bytes:
    """Something else: another format, an address, noise."""
    makers: tuple[Callable[[], bytes], ...] = (
        lambda: _file(Image.new("RGB", (8, 8)), "GIF"),
        lambda: _file(Image.new("RGB", (8, 8)), "TIFF"),
        lambda: _file(Image.new("RGB", (8, 8)), "BMP"),
        lambda: b"https://example.org/cat.png",
        lambda: b"file:///etc/passwd",
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://10.0.0.1/"/></svg>',
        lambda: rng.randbytes(rng.randint(1, 400)),
        lambda: b"\x89PNG\r\n\x1a\n" + rng.randbytes(100),
        lambda: b"RIFF" + rng.randbytes(4) + b"WEBPVP8X" + rng.randbytes(40),
        lambda: b"\xff\xd8\xff" + rng.randbytes(100),
    )
    return rng.choice(makers)()


def _file(image: Image.Image, image_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
