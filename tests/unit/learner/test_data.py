"""Datasets: what is read from each format, and that every mistake is one line."""

import base64
import dataclasses
import errno
import io
import json
import os
import sys
import types
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from PIL import ExifTags, Image

from common.config import ConfigError, NotYet, parse_config
from common.types import ChatMessage, MediaPart, TextPart
from learner.config.data import DataConfig
from learner.data.dataset import PromptDataset, load_datasets
from learner.types import PixelBounds, PromptSample
from tests.helpers.fakes import make_sample

MODULE = "rows_of_a_test"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `datasets` caches goes away with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def image(value: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(file, format=kind)
    return file.getvalue()


def verl_row(i: int, content: str = "<image>Which digit?", num_images: int = 1) -> dict[str, Any]:
    return {
        "data_source": "digits",
        "prompt": [{"role": "system", "content": "Answer."}, {"role": "user", "content": content}],
        "images": [{"bytes": image(10 * i + k), "path": None} for k in range(num_images)],
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"index": i},
    }


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def load(train: Path | str, **options: Any) -> PromptDataset:
    return load_datasets(DataConfig(train=str(train), **options))[0]


def test_verl_parquet_is_read_as_is(tmp_path: Path) -> None:
    rows = [verl_row(0), verl_row(1, "A <image> or\n<image>?", num_images=2)]
    dataset = load(write_parquet(tmp_path / "train.parquet", rows))
    assert len(dataset) == 2
    sample = dataset[1]
    assert sample.messages == (
        ChatMessage("system", (TextPart("Answer."),)),
        ChatMessage("user", (TextPart("A "), MediaPart(0), TextPart(" or\n"), MediaPart(1), TextPart("?"))),
    )
    # The very bytes of the file: their hash names the image everywhere.
    assert sample.images == (image(10), image(11))
    assert (sample.row, sample.ground_truth, sample.data_source) == (1, "1", "digits")
    assert sample.extra["extra_info"] == {"index": 1}
    assert "images" not in sample.extra


def test_parquet_written_by_datasets_keeps_the_encoded_bytes(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "answer": datasets.Value("int64"),
        }
    )
    rows = {"prompt": ["<image>?"], "images": [[{"bytes": image(3, "JPEG"), "path": None}]], "answer": [3]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    sample = load(tmp_path / "*.parquet")[0]
    assert sample.images == (image(3, "JPEG"),)
    assert sample.ground_truth == 3
    assert sample.messages == (ChatMessage("user", (MediaPart(0), TextPart("?"))),)


def test_jsonl_with_image_paths_and_parts(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.webp").write_bytes(image(5, "WEBP"))
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    row = {"prompt": [{"role": "user", "content": content}], "images": "pictures/a.webp", "meta": {"answer": "red"}}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    sample = load(tmp_path / "train.jsonl", answer_column="meta.answer")[0]
    assert sample.messages == (ChatMessage("user", (MediaPart(0), TextPart("What?"))),)
    assert sample.images == (image(5, "WEBP"),)
    assert sample.ground_truth == "red"


def test_image_folder_asks_one_question_and_answers_with_the_class(tmp_path: Path) -> None:
    for name, value in (("cat", 1), ("dog", 2)):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "1.png").write_bytes(image(value))
    dataset = load(tmp_path / "d", question="Which animal?")
    found = {dataset[row].ground_truth: dataset[row].images for row in range(2)}
    assert found == {"cat": (image(1),), "dog": (image(2),)}
    assert dataset[0].messages == (ChatMessage("user", (MediaPart(0), TextPart("Which animal?"))),)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", ["rows[1]", "r?ws*", "folder[1]/rows", "folder[1]"])
def test_a_path_that_exists_is_no_pattern(tmp_path: Path, name: str, suffix: str) -> None:
    """Also where a pattern of this name would find another file."""

    def write(path: Path, answer: str) -> None:
        rows = [{"prompt": "Which?", "answer": answer}]
        path.parent.mkdir(exist_ok=True)
        if suffix == "parquet":
            write_parquet(path, rows)
        else:
            path.write_text(json.dumps(rows[0]) + "\n")

    for other in (f"rows1.{suffix}", f"folder1/rows.{suffix}"):
        write(tmp_path / other, "another")
    train = name if name == "folder[1]" else f"{name}.{suffix}"
    write(tmp_path / (f"{name}/rows.{suffix}" if name == "folder[1]" else train), "right")
    dataset, _ = load_datasets(DataConfig(train=train, image_column="", answer_column="answer"), base_dir=tmp_path)
    assert [dataset[row].ground_truth for row in range(len(dataset))] == ["right"]


def test_a_folder_of_images_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    for folder, value in (("d[1]", 1), ("d1", 2)):
        for name in ("cat", "dog"):
            (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / name / "1.png").write_bytes(image(value))
    dataset = load(tmp_path / "d[1]", question="Which animal?")
    found = {dataset[row].ground_truth: dataset[row].images for row in range(len(dataset))}
    assert found == {"cat": (image(1),), "dog": (image(1),)}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_files_without_rows_are_passed_over(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": "Which?", "answer": "cat"}]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows)[:0], tmp_path / "0.parquet")
        write_parquet(tmp_path / "1.parquet", rows)
    else:
        (tmp_path / "0.jsonl").touch()
        (tmp_path / "1.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert len(load(tmp_path, image_column="", answer_column="answer")) == 1


@pytest.mark.parametrize("prompt", ["Which?", [{"role": "user", "content": "Which?"}]])
@pytest.mark.parametrize("pictures", [[1], [1, 2]])
def test_images_stand_before_a_text_without_markers(
    prompt: str | list[dict[str, str]], pictures: list[int], tmp_path: Path
) -> None:
    """Columns of data sets of the hub, as TRL reads them."""
    row = {"problem": prompt, "image": [{"bytes": image(value), "path": None} for value in pictures], "solution": "7"}
    path = write_parquet(tmp_path / "t.parquet", [row])
    sample = load(path, prompt_column="problem", image_column="image", answer_column="solution", suffix=" Think.")[0]
    parts = (*(MediaPart(i) for i in range(len(pictures))), TextPart("Which? Think."))
    assert sample.messages == (ChatMessage("user", parts),)
    assert sample.images == tuple(image(value) for value in pictures)


def test_rows_with_markers_may_follow_rows_without(module: types.ModuleType) -> None:
    rows = [{"prompt": text, "images": image(1), "answer": 1} for text in ("What?", "This: <image>", "<image><image>")]
    module.rows = lambda: rows  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="row 2 has 2 <image> markers for 1 images"):
        load(f"{MODULE}:rows")
    del rows[2]
    dataset = load(f"{MODULE}:rows")
    assert dataset[0].messages == (ChatMessage("user", (MediaPart(0), TextPart("What?"))),)
    assert dataset[1].messages == (ChatMessage("user", (TextPart("This: "), MediaPart(0))),)


def test_a_marker_in_the_first_row_asks_for_them_in_all(module: types.ModuleType) -> None:
    """A row without is then a mistake; one that asks the common question is not."""
    first = {"prompt": "<image>?", "images": image(1), "answer": 1}
    rows: list[dict[str, Any]] = [first, first | {"prompt": None}]
    module.rows = lambda: rows  # type: ignore[attr-defined]
    assert load(f"{MODULE}:rows", question="What?")[1].messages == (
        ChatMessage("user", (MediaPart(0), TextPart("What?"))),
    )
    rows[1] = first | {"prompt": "What?"}
    with pytest.raises(ConfigError, match="row 1 has 0 <image> markers for 1 images; write"):
        load(f"{MODULE}:rows")


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module
    yield module
    del sys.modules[MODULE]


def test_python_rows_with_pil_images_and_samples(module: types.ModuleType) -> None:
    picture = Image.new("RGB", (4, 4), (7, 0, 0))
    module.rows = lambda: iter([{"images": picture, "prompt": "<image>?", "answer": 1}])  # type: ignore[attr-defined]
    module.samples = lambda: [make_sample(3)]  # type: ignore[attr-defined]
    sample = load(f"{MODULE}:rows")[0]
    with Image.open(io.BytesIO(sample.images[0])) as decoded:
        assert decoded.format == "PNG"
        assert np.array_equal(np.asarray(decoded), np.asarray(picture))
    assert load(f"{MODULE}:samples")[0] == make_sample(3)


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


def test_held_out_by_fraction_is_disjoint_and_repeatable(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", [verl_row(i) for i in range(10)])

    def answers(dataset: PromptDataset | None) -> list[str]:
        assert dataset is not None
        return [dataset[row].ground_truth for row in range(len(dataset))]

    config = DataConfig(train=str(path), held_out_fraction=0.3)
    train, held_out = load_datasets(config)
    assert (len(train), len(answers(held_out))) == (7, 3)
    assert sorted(answers(train) + answers(held_out)) == [str(i) for i in range(10)]
    again = load_datasets(config)
    assert (answers(again[0]), answers(again[1])) == (answers(train), answers(held_out))
    other = load_datasets(DataConfig(train=str(path), held_out_fraction=0.3, split_seed=1))[1]
    assert answers(other) != answers(held_out)


def test_held_out_from_its_own_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [verl_row(i) for i in range(2)])
    write_parquet(tmp_path / "h.parquet", [verl_row(i) for i in range(5, 9)])
    config = DataConfig(train="t.parquet", held_out="h.parquet", max_held_out=9)
    train, held_out = load_datasets(config, base_dir=tmp_path)
    assert held_out is not None
    assert len(train) == 2
    assert [held_out[row].ground_truth for row in range(len(held_out))] == ["5", "6", "7", "8"]


@pytest.mark.parametrize("options", [{"held_out": "h.parquet"}, {"held_out_fraction": 0.5}])
def test_a_part_of_the_held_out_rows_is_of_all_of_them(tmp_path: Path, options: dict[str, Any]) -> None:
    """Files may be sorted by what they hold."""
    for name in "th":
        write_parquet(tmp_path / f"{name}.parquet", [verl_row(i) for i in range(100)])
    config = DataConfig(train="t.parquet", max_held_out=20, **options)
    train, held_out = load_datasets(config, base_dir=tmp_path)
    assert held_out is not None
    rows = [int(held_out[row].ground_truth) for row in range(len(held_out))]
    assert len(rows) == 20
    assert rows == sorted(rows)
    assert sum(row < 50 for row in rows) in range(5, 16)
    again = load_datasets(config, base_dir=tmp_path)[1]
    assert again is not None
    assert [int(again[row].ground_truth) for row in range(len(again))] == rows
    whole = load_datasets(config.model_copy(update={"max_held_out": 0}), base_dir=tmp_path)
    assert len(whole[0]) == len(train)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "x", "answer": 1}], {}, "no image column 'images' .it has prompt, answer.; set data.image_column"),
        ([{"images": image(1), "answer": 1}], {}, "no prompt column 'prompt' .* or data.question"),
        ([{"prompt": None, "images": image(1), "answer": 1}], {}, "row 0 has no 'prompt'; name the column, or give"),
        ([verl_row(0, "no marker")], {}, "row 0 has 0 <image> markers for 1 images; write one marker"),
        ([verl_row(0), verl_row(1, "<image><image>")], {}, "row 1 has 2 <image> markers for 1 images"),
        (
            [{"prompt": "<image> or?", "images": [image(1), image(2)], "answer": 1}],
            {},
            "row 0 has 1 <image> markers for 2 images; write one marker",
        ),
        (
            [
                {
                    "prompt": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}],
                    "images": image(1),
                    "answer": 1,
                }
            ],
            {},
            "row 0 has 0 <image> markers for 1 images; write one marker, or part of type image, into the prompt",
        ),
        ([{"prompt": "No picture: <image>", "images": None, "answer": 1}], {}, "row 0 has 1 <image> markers for 0 im"),
        ([{"prompt": "<image>", "images": image(1)}], {}, r"row 0 has no ground truth \(reward_model.ground_truth or"),
        (
            [{"prompt": "<image>", "images": image(1), "loesung": 7}],
            {"answer_column": "antwort"},
            r"row 0 has no ground truth \(antwort; it has prompt, images, loesung\); set data.answer_column",
        ),
        (
            [{"prompt": "<image>", "images": image(1), "meta": {"solution": 7, "level": 1}}],
            {"answer_column": "meta.answer"},
            r"row 0 has no ground truth \(meta.answer; it has prompt, images, meta\); set data.answer_column",
        ),
        ([{"prompt": "<image>", "images": b"junk", "answer": 1}], {}, "row 0 image 0 cannot be read"),
        (
            [{"prompt": "<image>", "images": "a.png", "answer": 1}],
            {},
            "row 0 image 0 is the file .*a.png: No such file",
        ),
        (
            [{"prompt": "<image>", "images": {"bytes": image(1), "resized_height": 28}, "answer": 1}],
            {},
            "row 0 image 0 has resized_height, which is not understood; there are bytes, image, path, min_pixels",
        ),
        (
            [{"prompt": "<image>", "images": {"bytes": image(1), "max_pixels": 0}, "answer": 1}],
            {},
            "row 0 image 0: max_pixels is 0; give a whole number, 1 or more",
        ),
        (
            [{"prompt": "<image>", "images": {"bytes": image(1), "min_pixels": 9}, "answer": 1}],
            {"max_pixels": 8},
            r"row 0 image 0: min_pixels \(9\) is more than max_pixels \(8\)",
        ),
        (
            [PromptSample(0, (ChatMessage("user", (MediaPart(0),)),), (b"",), 1, image_bounds=(PixelBounds(),) * 2)],
            {},
            "row 0 has image_bounds for 2 images, but 1 images",
        ),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image", "max_pixels": 9}]}], "images": image(1)}],
            {},
            "row 0 bounds the pixels of an image in the prompt; do so in the image column",
        ),
        ([{"prompt": 3, "images": None, "answer": 1}], {}, "neither text nor a list of role and content"),
        ([{"prompt": "x", "images": None, "videos": [b"v"], "answer": 1}], {}, "row 0 has videos"),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "answer": 1}],
            {"image_column": ""},
            "row 0 has a content part of type 'video'; there are 'text', with its text, and 'image'",
        ),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image_url"}, {"type": "text"}]}], "answer": 1}],
            {"image_column": ""},
            "row 0 has a content part of type 'image_url'",
        ),
        (
            [{"prompt": [{"role": "assistant", "content": [{"type": "thinking", "text": "x"}]}], "answer": 1}],
            {"image_column": ""},
            "row 0 has a content part of type 'thinking'",
        ),
        (
            [{"prompt": [{"role": "user", "content": ["hello"]}], "answer": 1}],
            {"image_column": ""},
            "part of type 'str'",
        ),
        (
            [{"prompt": [{"role": "assistant", "content": "x"}], "images": None, "answer": 1}],
            {"suffix": "y"},
            "row 0 has no message of the role 'user' for the suffix",
        ),
        ([], {}, "has no rows"),
        ([verl_row(0)], {"held_out_fraction": 0.5}, "leaves nothing of 1 rows"),
    ],
)
def test_mistakes_in_rows_are_one_line(
    module: types.ModuleType, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    module.rows = lambda: rows  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=message) as caught:
        load(f"{MODULE}:rows", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("missing.parquet", "missing.parquet does not exist; give a parquet file"),
        ("nowhere", "nowhere does not exist; give a file, a folder, or package.module:function"),
        ("hiyouga/geometry3k", "does not exist; .* `hf download --repo-type dataset NAME --local-dir DIRECTORY`"),
        ("no_such_package:rows", "cannot import 'no_such_package'"),
        ("broken.parquet", "broken.parquet cannot be read as parquet"),
        ("notes.txt", "the format of notes.txt is not clear; set data.format"),
        ("empty.jsonl", "empty.jsonl has no rows"),
        ("blank.jsonl", "blank.jsonl has no rows"),
        ("empty.parquet", "empty.parquet has no rows"),
        ("*.jsonl", r"\*.jsonl has no rows"),
        ("nothing.parquet", "nothing.parquet cannot be read as parquet: .* 0 bytes"),
    ],
)
def test_mistakes_in_paths_are_one_line(tmp_path: Path, train: str, message: str) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "nothing.parquet").touch()
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(ConfigError, match=message) as caught:
        load_datasets(DataConfig(train=train), base_dir=tmp_path)
    assert "\n" not in str(caught.value)


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


def test_a_function_may_return_a_data_set_that_stays_on_disk(module: types.ModuleType, tmp_path: Path) -> None:
    """Not decoded: the JPEG that it has is what is sent."""
    import datasets

    path = write_parquet(tmp_path / "a.parquet", [{"i": {"bytes": image(5, "JPEG"), "path": None}, "label": 1}])
    features = datasets.Features({"i": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    module.rows = lambda: datasets.load_dataset(  # type: ignore[attr-defined]
        "parquet", data_files=str(path), split="train", features=features
    )
    sample = load(f"{MODULE}:rows", image_column="i", question="Which?")[0]
    assert (sample.images, sample.ground_truth) == ((image(5, "JPEG"),), "dog")


def test_what_is_no_list_of_rows_is_one_line(module: types.ModuleType) -> None:
    """Usual mistakes: `load_dataset` without a split, and a table."""
    import datasets
    import pandas as pd  # type: ignore[import-untyped]

    row = {"prompt": ["x"], "answer": [1]}
    split = datasets.Dataset.from_dict(row)
    for made, message in (
        (datasets.DatasetDict(train=split, test=split), r"returned a mapping \(train, test\); return a list of rows"),
        (row, r"returned a mapping \(prompt, answer\)"),
        (pd.DataFrame(row), "rows_of_a_test:rows failed: KeyError: 0"),
    ):
        module.rows = lambda made=made: made  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match=message):
            load(f"{MODULE}:rows", image_column="")


def test_rows_of_a_function_are_read_one_by_one(module: types.ModuleType) -> None:
    """A map-style data set of torch has a length and items, and is no Sequence."""

    class Rows:
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, row: int) -> dict[str, Any]:
            return {"images": image(1), "prompt": "<image>", "answer": row}

    module.rows = Rows  # type: ignore[attr-defined]
    assert load(f"{MODULE}:rows")[10**8].ground_truth == 10**8


@pytest.mark.parametrize("missing", [None, -1])
def test_a_row_without_its_label_is_one_line(module: types.ModuleType, missing: int | None) -> None:
    import datasets

    features = datasets.Features({"prompt": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat"])})
    rows = datasets.Dataset.from_dict({"prompt": ["x"] * 9, "label": [0] * 8 + [missing]}, features=features)
    module.rows = lambda: rows  # type: ignore[attr-defined]
    dataset = load(f"{MODULE}:rows", image_column="")
    assert dataset[7].ground_truth == "cat"
    with pytest.raises(ConfigError, match="row 8 has no ground truth"):
        dataset[8]


@pytest.mark.parametrize(("error", "may_come"), [(KeyError("x"), False), (ConnectionError("no route"), True)])
def test_a_function_that_fails_is_one_line(module: types.ModuleType, error: Exception, may_come: bool) -> None:
    def rows() -> list[Any]:
        raise error

    module.rows = rows  # type: ignore[attr-defined]
    message = rf"data: {MODULE}:rows failed: {type(error).__name__}: .* \(test_data.py, line \d+\)$"
    with pytest.raises(ConfigError, match=message) as caught:
        load(f"{MODULE}:rows")
    assert isinstance(caught.value, NotYet) == may_come


def test_text_only_by_choice(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    assert load(tmp_path / "t.jsonl", image_column="")[0] == PromptSample(
        0, (ChatMessage("user", (TextPart("1+1?"),)),), (), "2", extra={"answer": "2"}
    )


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


def test_arguments_of_the_chat_template_are_those_of_each_row(module: types.ModuleType) -> None:
    own = dataclasses.replace(make_sample(3), template_arguments={"budget": 9})
    module.rows = lambda: [{"prompt": "?", "answer": 1}]  # type: ignore[attr-defined]
    module.samples = lambda: [own]  # type: ignore[attr-defined]
    arguments = {"enable_thinking": False, "budget": 3.0}
    for name, budget in (("rows", 3.0), ("samples", 9)):
        sample = load(f"{MODULE}:{name}", image_column="", chat_template_arguments=arguments)[0]
        assert json.dumps(sample.template_arguments) == json.dumps({"enable_thinking": False, "budget": budget})
    with pytest.raises(ConfigError, match=r"chat_template_arguments: add_generation_prompt is no variable of a chat"):
        parse_config(DataConfig, {"train": "a", "chat_template_arguments": {"add_generation_prompt": False}}, "x")


def test_arguments_of_a_sample_are_those_that_actors_take(module: types.ModuleType) -> None:
    own = dataclasses.replace(make_sample(3), template_arguments={"size": (1, 2)})
    module.samples = lambda: [own]  # type: ignore[attr-defined]
    assert load(f"{MODULE}:samples", image_column="")[0].template_arguments == {"size": [1, 2]}
    for arguments, problem in (
        ({"day": date(2026, 1, 1)}, "has no form in JSON: Object of type date"),
        ({"continue_final_message": False}, "continue_final_message is no variable of a chat template"),
    ):
        own.template_arguments.clear()
        own.template_arguments.update(arguments)
        with pytest.raises(ConfigError, match=f": row 0 template_arguments: {problem}"):
            load(f"{MODULE}:samples", image_column="")[0]


def test_all_rows_may_have_a_system_prompt_and_a_suffix(module: types.ModuleType) -> None:
    """Where a row has a system prompt it stays, and what follows the last user message stays behind it."""
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "user", "content": "Look <image>"},
        {"role": "assistant", "content": "Well"},
    ]
    module.rows = lambda: [  # type: ignore[attr-defined]
        {"prompt": "<image>How many?", "images": image(1), "answer": 1},
        verl_row(0),
        {"prompt": turns, "images": image(1), "answer": 1},
    ]
    module.samples = lambda: [make_sample(3)]  # type: ignore[attr-defined]
    options = {"system": "Be brief.", "suffix": " Think."}
    dataset = load(f"{MODULE}:rows", **options)
    system = ChatMessage("system", (TextPart("Be brief."),))
    assert dataset[0].messages == (system, ChatMessage("user", (MediaPart(0), TextPart("How many? Think."))))
    assert dataset[1].messages == (
        ChatMessage("system", (TextPart("Answer."),)),
        ChatMessage("user", (MediaPart(0), TextPart("Which digit? Think."))),
    )
    assert dataset[2].messages[2:] == (
        ChatMessage("user", (TextPart("Look "), MediaPart(0), TextPart(" Think."))),
        ChatMessage("assistant", (TextPart("Well"),)),
    )
    assert load(f"{MODULE}:samples", **options)[0].messages == (
        system,
        ChatMessage("user", (TextPart("row 3 Think."),)),
    )


def test_two_ways_of_holding_out_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="not both"):
        parse_config(DataConfig, {"train": "a", "held_out": "b", "held_out_fraction": 0.1}, "run.yaml")


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "<image>Which digit?", "images": [{"bytes": image(i)}], "answer": str(i)} for i in range(3)]
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "answer": datasets.Value("string"),
        }
    )
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(tmp_path / "one")
    dataset = load(tmp_path / "one")
    assert [(dataset[i].ground_truth, dataset[i].images) for i in range(len(dataset))] == [
        (str(i), (image(i),)) for i in range(3)
    ]

    datasets.DatasetDict(train=saved.select([2]), test=saved).save_to_disk(tmp_path / "two")
    train = load(tmp_path / "two")
    assert (len(train), train[0].ground_truth) == (1, "2")
    assert len(load(tmp_path / "two" / "test")) == 3
    datasets.DatasetDict(test=saved, val=saved).save_to_disk(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"other has no split train; name the folder of one, as .*/other/test$"):
        load(tmp_path / "other")


def test_of_a_reader_s_error_the_first_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("Couldn't cast\nprompt: string\n-- schema metadata --")

    (tmp_path / "train.jsonl").write_text("{}\n")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError, match=r"cannot be read as jsonl: Couldn't cast$"):
        load(tmp_path / "train.jsonl")


def test_names_of_files_are_no_patterns(tmp_path: Path) -> None:
    """`rows[1].jsonl` is that file, and not `rows1.jsonl`; of a glob, each file is read once."""
    folder = tmp_path / "all [x]*"
    folder.mkdir()
    for name, answer in (("rows[1].jsonl", "a"), ("rows1.jsonl", "b")):
        (folder / name).write_text(json.dumps({"prompt": "?", "answer": answer}) + "\n")

    def answers(where: Path) -> list[Any]:
        rows = load(where, image_column="")
        return [rows[i].ground_truth for i in range(len(rows))]

    assert answers(folder / "rows[1].jsonl") == ["a"]
    assert sorted(answers(folder)) == ["a", "b"]
    assert sorted(answers(folder / "rows*.jsonl")) == ["a", "b"]
