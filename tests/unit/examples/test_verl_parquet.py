"""The second example: its parquet files are what the learner's reader and `datasets` take as verl's."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

import examples.verl_parquet
from common.config import load_config
from common.types import ChatMessage, MediaPart, TextPart
from examples.digits import data
from examples.verl_parquet.make_parquet import make_parquet
from learner.config import LearnerConfig
from learner.config.data import DataConfig
from learner.data.dataset import load_datasets
from learner.rewards.load import load_rewards
from tests.helpers.fakes import make_task

FOLDER = Path(examples.verl_parquet.__file__).parent


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_parquet(tmp_path_factory.mktemp("verl"), num_train=12, num_held_out=5)


def test_columns_are_verls(files: tuple[Path, Path]) -> None:
    rows = pq.read_table(files[0]).to_pylist()
    assert len(rows) == 12
    assert list(rows[0]) == ["data_source", "prompt", "images", "ability", "reward_model", "extra_info"]
    row = int(data.split()[0][0])
    assert rows[0]["prompt"] == [{"role": "user", "content": "<image>Which digit?"}]
    assert rows[0]["images"] == [{"bytes": data.png(row), "path": None}]
    assert rows[0]["reward_model"] == {"style": "rule", "ground_truth": data.label(row)}
    assert rows[0]["extra_info"] == {"split": "train", "index": row}


def test_learner_reads_the_same_samples_as_from_code(files: tuple[Path, Path]) -> None:
    settings = yaml.safe_load((FOLDER / "config.yaml").read_text())["data"]
    train, held_out = load_datasets(DataConfig(**{**settings, "train": str(files[0]), "held_out": str(files[1])}))
    assert held_out is not None
    assert (len(train), len(held_out)) == (12, 5)
    for got, expected in zip((held_out[i] for i in range(5)), data.held_out()[:5], strict=True):
        assert got.messages == expected.messages == (ChatMessage("user", (MediaPart(0), TextPart("Which digit?"))),)
        assert (got.images, got.ground_truth) == (expected.images, expected.ground_truth)
        assert got.data_source == "digits"


@pytest.mark.parametrize("folder", ["digits", "verl_parquet"])
def test_configs_are_valid(folder: str) -> None:
    config = load_config(LearnerConfig, FOLDER.parent / folder / "config.yaml", [])
    [reward] = load_rewards(config.reward.functions)
    assert reward(make_task("4", "5", ground_truth="4")) == [1.0, 0.0]
    assert config.trainer.max_staleness == 0
