"""Writes the digits as parquet files in verl's columns: `python -m examples.verl_parquet.make_parquet DIR`.

| column | value |
|---|---|
| data_source | names the data set |
| prompt | list of {role, content}; `<image>` in the content stands for one image |
| images | list of {bytes, path}: encoded files |
| ability | what is trained |
| reward_model | {style, ground_truth} |
| extra_info | {split, index} |
"""

import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from examples.digits import data

# Spelled out, since a column of nothing but None has no type.
SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct({"split": pa.string(), "index": pa.int64()}),
    }
)


def make_parquet(out_dir: Path, num_train: int, num_held_out: int) -> tuple[Path, Path]:
    """Write the first rows of the digits' two splits; returns (train.parquet, held_out.parquet) in `out_dir`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = out_dir / "train.parquet", out_dir / "held_out.parquet"
    for path, rows, count in zip(paths, data.split(), (num_train, num_held_out), strict=True):
        table = pa.Table.from_pylist([verl_row(int(row), path.stem) for row in rows[:count]], schema=SCHEMA)
        pq.write_table(table, path)
    return paths


def verl_row(row: int, split: str) -> dict[str, Any]:
    """One scan in verl's columns."""
    return {
        "data_source": "digits",
        "prompt": [{"role": "user", "content": f"<image>{data.QUESTION}"}],
        "images": [{"bytes": data.png(row), "path": None}],
        "ability": "ocr",
        "reward_model": {"style": "rule", "ground_truth": data.label(row)},
        "extra_info": {"split": split, "index": row},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m examples.verl_parquet.make_parquet",
        description="Write the digits as parquet in verl's columns.",
    )
    parser.add_argument(
        "out_dir", type=Path, metavar="DIR", help="where train.parquet and held_out.parquet are written"
    )
    parser.add_argument("--train-rows", type=int, default=1437)
    parser.add_argument("--held-out-rows", type=int, default=360)
    options = parser.parse_args()
    for written in make_parquet(options.out_dir, options.train_rows, options.held_out_rows):
        print(written)
