"""Datasets of prompts, as files or Python code, with a train part and a held-out part.

Read with Hugging Face `datasets`: parquet and jsonl files (one, several by a glob, or a folder of them), a folder of
images, a data set that it saved to disk. Or a Python function "package.module:function" that returns rows. Rows are
described in `learner.data.rows`.

No `datasets`, no gRPC and no torch at import.
"""

import contextlib
import glob
import importlib
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from common.config import ConfigError
from learner.config.data import DataConfig, Format
from learner.data.rows import MARKER, RowReader
from learner.rewards.load import load_object, mistake
from learner.types import PromptSample

_SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
# Rows that are read at start, so that a wrong column is found before the actors are busy.
_NUM_CHECKED_ROWS = 4


class _Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Mapping[str, Any] | PromptSample: ...


class PromptDataset:
    """Some rows of a source, as `PromptSample`s. May be read from several threads."""

    def __init__(self, rows: _Rows, reader: RowReader, indices: Sequence[int] | None = None) -> None:
        self._rows = rows
        self._reader = reader
        self._indices = range(len(rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, row: int) -> PromptSample:
        number = int(self._indices[row])
        return self._reader.read(number, self._rows[number])

    def subset(self, rows: Sequence[int]) -> "PromptDataset":
        """These rows of this dataset, in this order."""
        return PromptDataset(self._rows, self._reader, [int(self._indices[row]) for row in rows])


def load_datasets(config: DataConfig, *, base_dir: Path | None = None) -> tuple[PromptDataset, PromptDataset | None]:
    """(train, held-out or None). Relative paths are relative to `base_dir` (by default the working directory).

    Raises `ConfigError`: one line that says what to do.
    """
    train = _load(config, config.train, base_dir or Path())
    held_out: PromptDataset | None = None
    if config.held_out:
        held_out = _load(config, config.held_out, base_dir or Path())
    elif config.held_out_fraction:
        order = _shuffled(config, train)
        num_held_out = max(1, round(len(train) * config.held_out_fraction))
        if num_held_out >= len(train):
            raise ConfigError(
                f"data.held_out_fraction: leaves nothing of {len(train)} rows to train on; make it smaller"
            )
        held_out = train.subset(np.sort(order[:num_held_out]).tolist())
        train = train.subset(np.sort(order[num_held_out:]).tolist())
    if held_out is not None and config.max_held_out:  # some of all: files may be sorted by what they hold
        held_out = held_out.subset(np.sort(_shuffled(config, held_out)[: config.max_held_out]).tolist())
    return train, held_out


def _shuffled(config: DataConfig, dataset: PromptDataset) -> npt.NDArray[np.int64]:
    return np.random.default_rng(config.split_seed).permutation(len(dataset))


def _load(config: DataConfig, where: str, base_dir: Path) -> PromptDataset:
    kind = config.format if config.format != "auto" else _guess_format(where, base_dir)
    if kind == "python":
        rows, folder = _python_rows(where), base_dir
    else:
        rows, folder = _file_rows(where, kind, base_dir)
    if not len(rows):
        raise ConfigError(f"data: {where} has no rows")
    image_column = config.image_column
    first = rows[0]
    needs_markers = False
    if not isinstance(first, PromptSample):
        needs_markers = MARKER in str(first.get(config.prompt_column))
        if kind == "imagefolder" and image_column == "images":
            image_column = "image"
        _check_columns(config, where, image_column, list(first))
    reader = RowReader(
        source=where,
        prompt_column=config.prompt_column,
        image_column=image_column,
        answer_column=config.answer_column,
        question=config.question,
        system=config.system,
        suffix=config.suffix,
        base_dir=folder,
        bounds=config.bounds,
        template_arguments=config.chat_template_arguments,
        needs_markers=needs_markers,
    )
    dataset = PromptDataset(rows, reader)
    for row in range(min(_NUM_CHECKED_ROWS, len(dataset))):
        dataset[row]
    return dataset


def _check_columns(config: DataConfig, where: str, image_column: str, columns: list[str]) -> None:
    has = f"it has {', '.join(columns)}"
    if image_column and image_column not in columns:
        raise ConfigError(
            f"{where}: no image column {image_column!r} ({has}); set data.image_column, or '' for text only"
        )
    if config.prompt_column not in columns and not config.question:
        raise ConfigError(
            f"{where}: no prompt column {config.prompt_column!r} ({has}); set data.prompt_column, or data.question"
        )


def _guess_format(where: str, base_dir: Path) -> Format:
    path = base_dir / where
    if path.is_dir():
        if _is_saved(path):
            return "arrow"
        for suffix, kind in _SUFFIXES.items():
            if any(path.glob(f"*{suffix}")):
                return kind
        return "imagefolder"
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    if ":" in where and not path.exists():
        return "python"
    if not path.exists():
        raise ConfigError(
            f"data: {where} does not exist; give a file, a folder, or package.module:function. "
            "`hf download --repo-type dataset NAME --local-dir DIRECTORY` gets one of the hub"
        )
    raise ConfigError(f"data: the format of {where} is not clear; set data.format")


def _python_rows(where: str) -> _Rows:
    function = load_object(where, "data")
    if not callable(function):
        raise ConfigError(f"data: {where} is no function")
    try:
        rows: Any = function()
        if (datasets := sys.modules.get("datasets")) is not None and isinstance(rows, datasets.Dataset):
            return _Encoded(rows, datasets)
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            rows = list(rows)
        if not isinstance(rows, Mapping):
            _ = [rows[row] for row in range(min(1, len(rows)))]  # a table of pandas has a length too, and fails here
            return cast("_Rows", rows)
    except Exception as error:
        raise mistake(f"data: {where} failed", error) from error
    parts = ", ".join(itertools.islice(map(str, rows), 5))
    raise ConfigError(f"data: {where} returned a mapping ({parts}); return a list of rows, or one split of a data set")


def _file_rows(where: str, kind: Format, base_dir: Path) -> tuple[_Rows, Path]:
    """The rows of files, images still encoded, and the folder that relative image paths start from."""
    datasets = importlib.import_module("datasets")  # 6 s
    datasets.disable_progress_bars()
    path = base_dir / where
    if kind == "arrow":
        return _Encoded(_reading(where, kind, datasets.load_from_disk, str(_split(path, where))), datasets), path
    if kind == "imagefolder":
        if not path.is_dir():
            raise ConfigError(f"data: {where} is no folder of images")
        # It and the files below are patterns to `datasets`.
        arguments: dict[str, Any] = {"data_dir": glob.escape(str(path)), "drop_labels": None}
    else:
        files = _files(path, kind)
        if not files:
            raise ConfigError(f"data: {where} does not exist; give a {kind} file, a glob, or a folder of them")
        files = [file for file in files if _has_rows(file, kind)]  # the readers fail at others, and do not say at which
        if not files:
            raise ConfigError(f"data: {where} has no rows")
        arguments = {"data_files": [glob.escape(str(file)) for file in files]}
    builder = {"parquet": "parquet", "jsonl": "json", "imagefolder": "imagefolder"}[kind]
    rows = _reading(where, kind, datasets.load_dataset, builder, split="train", **arguments)
    return _Encoded(rows, datasets), (path if path.is_dir() else path.parent)


def _reading(where: str, kind: Format, read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return read(*arguments, **options)
    except Exception as error:  # the readers' own errors, of many kinds: all mean that the files are bad
        reason, _, _ = str(error.__cause__ or error).strip().partition("\n")  # pyarrow adds whole schemas
        raise ConfigError(f"data: {where} cannot be read as {kind}: {reason[:300]}") from error


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` of `datasets` has made this folder, of one split or of several."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _split(path: Path, where: str) -> Path:
    """The folder of the rows: of several splits the one for training."""
    if (path / "state.json").is_file():
        return path
    if (path / "train" / "state.json").is_file():
        return path / "train"
    others = sorted(state.parent for state in path.glob("*/state.json"))
    hint = f"name the folder of one, as {others[0]}" if others else "give a folder that `save_to_disk` has made"
    raise ConfigError(f"data: {where} has no split train; {hint}")


def _files(path: Path, kind: Format) -> list[Path]:
    if path.is_dir():
        return sorted(itertools.chain(*(path.glob(f"*{suffix}") for suffix, k in _SUFFIXES.items() if k == kind)))
    if path.exists():
        return [path]
    return sorted(path.parent.glob(path.name))


def _has_rows(file: Path, kind: Format) -> bool:
    """Whether a file has any, or cannot be read: the reader says why."""
    with contextlib.suppress(OSError, ValueError):
        if kind == "parquet":
            parquet = importlib.import_module("pyarrow.parquet")
            return bool(parquet.read_metadata(file).num_rows)
        with file.open("rb") as text:
            return any(chunk.strip() for chunk in iter(lambda: text.read(2**16), b""))
    return True


class _Encoded:
    """A `datasets.Dataset` whose images stay the files that they are, and whose class labels are their names."""

    def __init__(self, rows: Any, datasets: Any) -> None:
        self._labels: dict[str, Any] = {}
        for name, feature in dict(rows.features).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
            elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
                rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
            elif isinstance(feature, datasets.ClassLabel):
                self._labels[name] = feature
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        values: dict[str, Any] = self._rows[row]
        named = {name: values[name] for name in self._labels}
        # Rows without a label have None, or -1 as test splits of the hub have it.
        return values | {
            name: None if label is None or label < 0 else self._labels[name].int2str(label)
            for name, label in named.items()
        }
