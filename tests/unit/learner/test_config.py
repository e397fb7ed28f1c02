"""The configuration of a run."""

from pathlib import Path

import pytest

from common.config import load_config
from learner.config import LearnerConfig

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("file", sorted(ROOT.glob("examples/*/config.yaml")), ids=lambda path: path.parent.name)
def test_a_configuration_written_out_in_full_is_the_same_configuration(file: Path) -> None:
    """The launcher hands it to the learner like that."""
    config = load_config(LearnerConfig, file, [])
    assert LearnerConfig.model_validate(config.model_dump(mode="json")) == config
