"""Images of rows: what becomes of each form and format, and that every mistake is one line."""

import base64
import dataclasses
import errno
import io
import os
import types
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from common.config import ConfigError, NotYet, parse_config
from common.types import ChatMessage, MediaPart
from learner.config.data import DataConfig
from learner.types import PixelBounds, PromptSample
from tests.helpers.rows import MODULE, image, load, verl_row, write_parquet


def test_other_formats_become_png_with_the_same_pixels(module: types.ModuleType) -> None:
    row = {"images": image(9, "BMP"), "prompt": "<image>?", "answer": 1}
    module.rows = lambda: [row]  # type: ignore[attr-defined]
    with Image.open(io.BytesIO(load(f"{MODULE}:rows")[0].images[0])) as decoded:
        assert decoded.format == "PNG"
        assert decoded.getpixel((0, 0)) == (9, 0, 0)


def test_pictures_are_written_again_as_they_are_shown(module: types.ModuleType) -> None:
    """Upright, and with white behind what is transparent; a photo with a gain map stays the file that it is."""
    turned, file, photo = Image.Exif(), io.BytesIO(), io.BytesIO()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (8, 6)).save(file, "TIFF", exif=turned)
    Image.new("RGB", (8, 6)).save(photo, "MPO", save_all=True, append_images=[Image.new("L", (4, 3))])
    pictures = [Image.new("RGBA", (8, 6), (0, 0, 0, 0)), file.getvalue(), photo.getvalue()]
    module.rows = lambda: [{"images": pictures, "prompt": "<image><image><image>", "answer": 1}]  # type: ignore[attr-defined]
    clear, upright, kept = load(f"{MODULE}:rows")[0].images
    with Image.open(io.BytesIO(clear)) as decoded:
        assert decoded.getcolors() == [(48, (255, 255, 255))]
    with Image.open(io.BytesIO(upright)) as decoded:
        assert (decoded.size, decoded.getexif()) == ((6, 8), {})
    assert kept == photo.getvalue()


def test_images_have_their_own_bounds_or_those_of_all(tmp_path: Path) -> None:
    """verl's dictionaries, from a file whose columns all rows share."""
    (tmp_path / "a.png").write_bytes(image(7))
    row = verl_row(0, "<image><image><image>") | {
        "images": [
            {
                "bytes": image(1),
                "path": None,
                "image": None,
                "min_pixels": None,
                "max_pixels": None,
                "resized_height": None,
            },
            {"bytes": None, "path": None, "image": f"file://{tmp_path}/a.png", "min_pixels": None, "max_pixels": 500},
            {"bytes": None, "path": "a.png", "image": None, "min_pixels": 100, "max_pixels": 300},
        ]
    }
    path = write_parquet(tmp_path / "t.parquet", [row])
    sample = load(path, min_pixels=200, max_pixels=400)[0]
    assert sample.images == (image(1), image(7), image(7))
    assert sample.image_bounds == (PixelBounds(200, 400), PixelBounds(200, 500), PixelBounds(100, 300))
    assert load(path)[0].image_bounds == (PixelBounds(), PixelBounds(None, 500), PixelBounds(100, 300))


def test_samples_of_python_rows_have_them_too(module: types.ModuleType) -> None:
    picture = {"image": Image.new("RGB", (4, 4)), "max_pixels": 300}
    given = PromptSample(0, (ChatMessage("user", (MediaPart(0),)),), (image(1),), "x")
    own = dataclasses.replace(given, image_bounds=(PixelBounds(max_pixels=300),))
    module.rows = lambda: [{"images": picture, "prompt": "<image>", "answer": 1}]  # type: ignore[attr-defined]
    module.samples = lambda: [given, own]  # type: ignore[attr-defined]
    assert load(f"{MODULE}:rows", min_pixels=9)[0].image_bounds == (PixelBounds(9, 300),)
    samples = load(f"{MODULE}:samples", max_pixels=400)
    assert [samples[row].image_bounds[0].max_pixels for row in range(2)] == [400, 300]


@pytest.mark.parametrize(
    ("code", "may_come"),
    [
        (errno.EIO, True),
        (errno.ESTALE, True),
        (errno.ETIMEDOUT, True),
        (errno.ENOENT, False),
        (errno.EACCES, False),
        (errno.EISDIR, False),
        (errno.ENOTDIR, False),
        (errno.ENAMETOOLONG, False),
    ],
)
def test_a_disk_that_fails_is_no_mistake(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, code: int, may_come: bool
) -> None:
    def fail(_path: Path) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "read_bytes", fail)
    module.rows = lambda: [{"images": "a.png", "prompt": "<image>", "answer": 1}]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=f"row 0 image 0 is the file a.png: {os.strerror(code)}") as caught:
        load(f"{MODULE}:rows")
    assert isinstance(caught.value, NotYet) == may_come


@pytest.mark.parametrize("file", [b"junk", image(1)[:40]])
def test_a_file_that_is_no_image_is_a_mistake(module: types.ModuleType, file: bytes) -> None:
    """Pillow says so by an OSError."""
    module.rows = lambda: [{"images": file, "prompt": "<image>", "answer": 1}]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="row 0 image 0 cannot be read") as caught:
        load(f"{MODULE}:rows")
    assert not isinstance(caught.value, NotYet)


def _tiff(mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (4, 4)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (_tiff("F"), "has pixels of mode F; convert it to 8 bits per channel"),
        (_tiff("I;16"), "has pixels of mode I;16; convert"),
        (Image.new("I", (4, 4)), "has pixels of mode I; convert"),
        (b"P6 8 6 255 short", "cannot be read"),
        (b"P6 x", "cannot be read"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
            "cannot be read: no format of images that is known here",
        ),
        ("data:image/png;base64,===" + "A" * 9999, "is a data URL without proper base64: data:image/png.{1,200}$"),
        ("data:image/svg+xml,<svg/>", "is a data URL without proper base64"),
        ("https://example.org/a.png", "is https://example.org/a.png; no URL is fetched"),
        ("a\0.png", "is the file .*: embedded null byte"),
    ],
)
def test_images_that_would_not_be_shown_as_they_are(module: types.ModuleType, value: object, message: str) -> None:
    """Pillow itself makes a white or a black picture of deep pixels, and starts another program for PostScript."""
    module.rows = lambda: [{"images": value, "prompt": "<image>", "answer": 1}]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=f"row 0 image 0 {message}") as caught:
        load(f"{MODULE}:rows")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_an_image_may_be_a_data_url(module: types.ModuleType) -> None:
    url = f"data:image/png;base64,{base64.b64encode(image(3)).decode()}"
    module.rows = lambda: [{"images": url, "prompt": "<image>", "answer": 1}]  # type: ignore[attr-defined]
    assert load(f"{MODULE}:rows")[0].images == (image(3),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_pixels": 9, "max_pixels": 8}, r"min_pixels \(9\) is more than max_pixels \(8\)"),
        ({"max_pixels": 0}, "max_pixels is 0; give a whole number"),
        ({"max_pixels": 901, "max_media_pixels": 900}, r"max_pixels \(901\) is more than max_media_pixels \(900\)"),
    ],
)
def test_bounds_that_no_image_keeps(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(DataConfig, {"train": "a"} | options, "run.yaml")
