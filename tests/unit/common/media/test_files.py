import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from common.errors import InvalidRequest, TooLarge
from common.media import ImageHeader, check_image, content_hash, decode_frames, decode_image
from common.types import Frames

PIXELS = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
INK = Image.fromarray(np.random.default_rng(1).integers(0, 255, (5, 7, 4), dtype=np.uint8))  # of every strength


def _encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


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


def test_black_ink_on_nothing_is_black_on_white() -> None:
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (10, 5, 30, 15))
    colours = decode_image(_encode(image, "PNG"), "f", 1000).getcolors()
    assert colours is not None
    assert sorted(colours) == [(200, (0, 0, 0)), (600, (255, 255, 255))]


def test_a_colour_that_stands_for_nothing_is_white() -> None:
    image = Image.new("RGB", (4, 2), (255, 0, 255))
    image.putpixel((1, 1), (0, 0, 9))
    decoded = decode_image(_encode(image, "PNG", transparency=(255, 0, 255)), "f", 1000)
    assert decoded.getcolors() == [(7, (255, 255, 255)), (1, (0, 0, 9))]


def test_a_photo_is_upright() -> None:
    """Orientation 6: the first row of what is stored is the right edge of what was seen."""
    data = _encode(Image.new("RGB", (40, 20), "navy"), "JPEG", exif=_turned(6))
    assert decode_image(data, "f", 1000).size == (20, 40)
    assert check_image(data, "f", 1000) == ImageHeader("JPEG", width=40, height=20)
    turned = decode_image(_encode(Image.fromarray(PIXELS), "PNG", exif=_turned(6)), "f", 1000)
    np.testing.assert_array_equal(np.asarray(turned)[:, -1], PIXELS[0])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_data_that_say_nothing_cost_no_image() -> None:
    data = _encode(Image.fromarray(PIXELS), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(np.asarray(decode_image(data, "f", 1000)), PIXELS)


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (INK, {}),
        (INK.convert("LA"), {}),
        (INK.convert("RGB").quantize(9), {"transparency": bytes(range(0, 252, 28))}),
        (INK.convert("L"), {"transparency": 77}),
        *((INK, {"exif": _turned(orientation)}) for orientation in range(1, 9)),
    ],
    ids=["RGBA", "LA", "palette", "grey", *map(str, range(1, 9))],
)
def test_the_pixels_are_those_of_vllms_own_server(image: Image.Image, options: dict[str, object]) -> None:
    from vllm.multimodal.image import convert_image_mode, normalize_image

    data = _encode(image, "PNG", **options)
    theirs = convert_image_mode(normalize_image(Image.open(io.BytesIO(data))), "RGB")
    np.testing.assert_array_equal(np.asarray(decode_image(data, "f", 1000)), np.asarray(theirs))


def test_of_a_photo_with_more_behind_it_the_first_picture_counts() -> None:
    """As phones add a gain map."""
    photo, gain_map = Image.new("RGB", (40, 20), "white"), Image.new("L", (20, 10))
    data = _encode(photo, "MPO", save_all=True, append_images=[gain_map], exif=_turned(8))
    assert check_image(data, "f", 800) == ImageHeader("MPO", width=40, height=20)
    decoded = decode_image(data, "f", 800)
    assert (decoded.size, decoded.getcolors()) == ((20, 40), [(800, (255, 255, 255))])


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_the_pixels_are_copied_once_and_the_file_is_let_go(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Image.Image] = []
    copy = Image.Image.copy

    def counted(image: Image.Image) -> Image.Image:
        copied.append(image)
        return copy(image)

    monkeypatch.setattr(Image.Image, "copy", counted)
    decoded = decode_image(_encode(Image.fromarray(PIXELS), image_format), "f", 1000)
    assert len(copied) == 1
    assert type(decoded) is Image.Image


def test_frames_of_a_video_are_upright_together() -> None:
    stored = Image.fromarray(PIXELS)
    turned, flat = _encode(stored, "PNG", exif=_turned(6)), _encode(stored, "PNG")
    assert decode_frames(Frames((turned, turned)), "f", 2, 70).shape == (2, 7, 5, 3)
    with pytest.raises(InvalidRequest, match=r"\[1\]: 7x5 pixels when it is upright; the first frame has 5x7$"):
        decode_frames(Frames((turned, flat)), "f", 2, 70)


def test_too_many_pixels_are_refused_by_the_header_alone() -> None:
    with pytest.raises(TooLarge, match=r"^media\[0\]\.encoded: 7x5 pixels, more than the limit of 34$"):
        decode_image(_encode(Image.fromarray(PIXELS), "PNG"), "media[0].encoded", 34)
    for size in (20_000, 2**31 - 1):  # Pillow's own warning, and its own error
        with pytest.raises(TooLarge):
            check_image(_png_header(size, size), "f", 10**6)


def _with_parts(image_format: str, num_parts: int, part: bytes = b"") -> bytes:
    """A good file with so many parts before its pixels, by hand, and empty ones if not told otherwise."""
    data = _encode(Image.fromarray(PIXELS), image_format)
    match image_format:
        case "JPEG":
            return data[:2] + (part or b"\xff\xe5\0\2") * num_parts + data[2:]
        case "PNG":
            chunk = bytes(4) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))
            return data[:33] + chunk * num_parts + data[33:]
        case _:
            extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\6\0\0" + b"\4\0\0"
            padded = b"abcd" + struct.pack("<I", 1) + bytes(2)
            chunks = extended + data[12:] + padded + (b"abcd" + bytes(4)) * (num_parts - 1)
            return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


@pytest.mark.parametrize(
    "data",
    [
        *(_with_parts(image_format, 2000) for image_format in ("JPEG", "PNG", "WEBP")),
        _with_parts("JPEG", 2000, b"\xff"),
        _with_parts("JPEG", 1, b"\xff\xe5\0\2" + bytes(2000)),
        _with_parts("JPEG", 2000, b"\xff\xd0"),
        # PIL reads on behind this marker, where the standard has a length.
        _with_parts("JPEG", 1, b"\xff\xf0\7\xd2" + bytes(2000)),
    ],
    ids=["jpeg", "png", "webp", "fill", "junk", "restart", "extension"],
)
def test_too_many_parts_are_refused_before_the_header_is_read(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with Image.open(io.BytesIO(data)) as image:  # or this would say nothing
        assert image.size == (7, 5)
    monkeypatch.delattr(Image, "open")
    with pytest.raises(InvalidRequest, match="f: more than 300 segments or chunks beside the pixels"):
        check_image(data, "f", 1000)


def _in_scans(num_scans: int, before: bytes = b"") -> bytes:
    """A good file that sends its pixels in so many scans, by hand: the last one again and again, with `before` it."""
    data = _encode(Image.fromarray(PIXELS), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xc4") : -2]  # with the table that it refers to
    assert last.count(b"\xff\xda") == 1
    return data[:-2] + (before + last) * (num_scans - data.count(b"\xff\xda")) + data[-2:]


@pytest.mark.parametrize("before", [b"", b"\xff\x01"], ids=["scans", "and markers without a length"])
def test_too_many_scans_are_refused_before_the_header_is_read(before: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with Image.open(io.BytesIO(_in_scans(65, before))) as image:  # or this would say nothing
        image.load()
    assert decode_image(_in_scans(64), "f", 1000).size == (7, 5)
    monkeypatch.delattr(Image, "open")
    with pytest.raises(InvalidRequest) as refused:
        check_image(_in_scans(65, before), "f", 1000)
    assert str(refused.value) == "f: 65 scans, more than the limit of 64; save the image again"
    with pytest.raises(InvalidRequest, match="f: more than 300 segments or chunks beside the pixels"):
        check_image(_in_scans(10_000), "f", 1000)


@pytest.mark.parametrize("progressive", [False, True])
def test_what_looks_like_a_scan_in_or_behind_a_picture_is_none(progressive: bool) -> None:
    """As in a profile, and in the film that a phone puts behind a photo."""
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    options = {"progressive": progressive, "restart_marker_blocks": 1, "icc_profile": b"\xff\xda" * 1000}
    data = _encode(Image.fromarray(noise), "JPEG", **options) + b"\0\2" + b"\xff\xda\0\2" * 1000
    assert decode_image(data, "f", 10**6).size == (400, 400)


def _chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_of_chunks(num_bytes: int) -> bytes:
    """A good file with so much of its compressed pixels in each IDAT."""
    rows = np.random.default_rng(0).integers(0, 255, (400, 1 + 3 * 400), dtype=np.uint8)
    rows[:, 0] = 0  # no filter
    pixels = zlib.compress(rows.tobytes())
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 400, 400, 8, 2, 0, 0, 0))
    parts = (_chunk(b"IDAT", pixels[i : i + num_bytes]) for i in range(0, len(pixels), num_bytes))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(parts) + _chunk(b"IEND")


def _animation(image_format: str) -> bytes:
    frames = list(map(Image.fromarray, np.random.default_rng(0).integers(0, 255, (400, 8, 8, 3), dtype=np.uint8)))
    return _encode(frames[0], image_format, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    "data",
    [
        _encode(Image.fromarray(PIXELS), "PNG")[:-12] + _chunk(b"abCd") * 2000 + _chunk(b"IEND"),
        _encode(Image.fromarray(PIXELS), "PNG")[:-12] + _chunk(b"IDAT") * 2000 + _chunk(b"IEND"),
        _png_of_chunks(100),
        _animation("PNG"),
        _animation("WEBP"),
    ],
    ids=["behind the pixels", "no pixels in them", "few pixels in them", "png frames", "webp frames"],
)
def test_too_many_parts_among_and_behind_the_pixels_are_refused(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
    with pytest.raises(InvalidRequest, match=r"300 segments .* without metadata, and an animation as single images$"):
        check_image(data, "f", 10**6)


def test_pixels_may_be_in_many_parts() -> None:
    assert _png_of_chunks(256).count(b"IDAT") > 1000
    assert decode_image(_png_of_chunks(256), "f", 10**6).size == (400, 400)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_metadata_is_fine(image_format: str) -> None:
    assert check_image(_with_parts(image_format, 255), "f", 35) == ImageHeader(image_format, width=7, height=5)
    profile = _encode(Image.fromarray(PIXELS), image_format, icc_profile=bytes(2**20), exif=b"Exif\0\0" + bytes(50))
    for data in (profile, profile + bytes(5000)):
        assert check_image(data, "f", 35) == ImageHeader(image_format, width=7, height=5)


@pytest.mark.parametrize("part", [b"\xff", b"\xff\xd0"], ids=["fill", "restart"])
def test_what_is_in_no_segment_is_fine_in_small_numbers(part: bytes) -> None:
    assert check_image(_with_parts("JPEG", 101, part), "f", 35) == ImageHeader("JPEG", width=7, height=5)


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
