"""The configuration of a run."""

from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError, load_config, parse_config
from learner.config import LearnerConfig

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("file", sorted(ROOT.glob("examples/*/config.yaml")), ids=lambda path: path.parent.name)
def test_a_configuration_written_out_in_full_is_the_same_configuration(file: Path) -> None:
    """The launcher hands it to the learner like that."""
    config = load_config(LearnerConfig, file, [])
    assert LearnerConfig.model_validate(config.model_dump(mode="json")) == config


_RUN: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"train": "t"},
    "trainer": {"total_steps": 1, "batch_prompts": 1},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed: .*greater than or equal to 0"),
        ({"rollout": {"seed": 2**30}}, "rollout.seed: .*less than 1073741824"),
        ({"rollout": {"seed": -1}}, "rollout.seed: .*greater than or equal to 0"),
        ({"data": {"train": "t", "held_out_fraction": 0.1, "split_seed": -1}}, "data.split_seed"),
        ({"rollout": {"temperature": 2.5}}, "rollout.temperature: .*less than or equal to 2"),
        ({"optimizer": {"betas": [1.5, 0.9]}}, "optimizer.betas.0: .*less than 1"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr: .*finite"),
        ({"algorithm": {"entropy_coef": float("nan")}}, "algorithm.entropy_coef: .*finite"),
        ({"optimizer": {"min_lr_ratio": 0.1}}, "min_lr_ratio needs schedule: linear or cosine"),
        ({"algorithm": {"overlong_penalty": 0.5}}, "overlong_penalty needs an overlong_buffer"),
        ({"evaluation": {"temperature": 0.5}}, "temperature needs samples"),
        (
            {"evaluation": {"samples": 4}},
            "evaluation.samples needs rows to evaluate on: data.held_out or",
        ),
        ({"trainer": {**_RUN["trainer"], "eval_every": 5}}, "trainer.eval_every needs rows to evaluate on"),
        ({"data": {"train": "t", "max_held_out": 5}}, "data.max_held_out needs rows to evaluate on"),
    ],
)
def test_what_would_fail_late_or_has_no_effect_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse_config(LearnerConfig, _RUN | changes, "run.yaml")
    assert "\n" not in str(refused.value)
