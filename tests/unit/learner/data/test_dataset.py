"""Datasets: what is read from each format, and that every mistake is one line."""

import io
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from PIL import Image

from common.config import ConfigError, NotYet, parse_config
from common.types import ChatMessage, MediaPart, TextPart
from learner.config.data import DataConfig
from learner.data.dataset import PromptDataset, load_datasets
from tests.helpers.fakes import make_sample
from tests.helpers.rows import MODULE, image, load, verl_row, write_parquet


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


def test_python_rows_with_pil_images_and_samples(module: types.ModuleType) -> None:
    picture = Image.new("RGB", (4, 4), (7, 0, 0))
    module.rows = lambda: iter([{"images": picture, "prompt": "<image>?", "answer": 1}])  # type: ignore[attr-defined]
    module.samples = lambda: [make_sample(3)]  # type: ignore[attr-defined]
    sample = load(f"{MODULE}:rows")[0]
    with Image.open(io.BytesIO(sample.images[0])) as decoded:
        assert decoded.format == "PNG"
        assert np.array_equal(np.asarray(decoded), np.asarray(picture))
    assert load(f"{MODULE}:samples")[0] == make_sample(3)


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


@pytest.mark.parametrize(("error", "may_come"), [(KeyError("x"), False), (ConnectionError("no route"), True)])
def test_a_function_that_fails_is_one_line(module: types.ModuleType, error: Exception, may_come: bool) -> None:
    def rows() -> list[Any]:
        raise error

    module.rows = rows  # type: ignore[attr-defined]
    message = rf"data: {MODULE}:rows failed: {type(error).__name__}: .* \(test_dataset.py, line \d+\)$"
    with pytest.raises(ConfigError, match=message) as caught:
        load(f"{MODULE}:rows")
    assert isinstance(caught.value, NotYet) == may_come


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
