"""Rows of data sets."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from learner.config.data import DataConfig
from learner.data.dataset import PromptDataset, load_datasets

MODULE = "rows_of_a_test"


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
