"""The configuration of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import ConfigError, load_config, parse_config
from learner.config import _MIN_LR_BFLOAT16, LearnerConfig, TrainerConfig
from tests.helpers.settings import num_keys, undocumented_keys

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("file", sorted(ROOT.glob("examples/*/*.yaml")), ids=lambda path: path.parent.name)
def test_a_configuration_written_out_in_full_is_the_same_configuration(file: Path) -> None:
    """The launcher hands it to the learner like that."""
    config = load_config(LearnerConfig, file, [])
    assert LearnerConfig.model_validate(config.model_dump(mode="json")) == config


_RUN: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"train": "t"},
    "trainer": {"total_steps": 1, "batch_prompts": 1},
}


def test_every_key_has_a_docstring_below_it() -> None:
    found, without = undocumented_keys(sorted((ROOT / "learner/config").glob("*.py")))
    assert without == []
    assert found == num_keys(LearnerConfig)  # no section is anywhere else


def test_a_run_that_is_stopped_has_the_checkpoints_that_the_readme_promises() -> None:
    every = parse_config(LearnerConfig, _RUN, "a test").trainer.checkpoint_every
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"(one every {every} steps, `trainer.checkpoint_every`)" in readme


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
        ({"trainer": {"batch_prompts": 1}}, "trainer: set total_steps or total_passes$"),
        (
            {"trainer": {**_RUN["trainer"], "total_passes": 2}},
            "trainer: set total_steps or total_passes, not both; `null` unsets one",
        ),
        ({"trainer": {"batch_prompts": 1, "total_passes": 0}}, "trainer.total_passes: .*greater than 0"),
        ({"data": {"train": "t", "max_held_out": 5}}, "data.max_held_out needs rows to evaluate on"),
        (
            {"model": {"path": "m", "dtype": "bfloat16"}},  # at the learning rate that is the default
            "optimizer.lr: steps of 1e-06 are rounded away where bfloat16 weights train; leave model.dtype at float32",
        ),
    ],
)
def test_what_would_fail_late_or_has_no_effect_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse_config(LearnerConfig, _RUN | changes, "run.yaml")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("passes", "num_rows", "steps", "words"),
    [
        (2, 100, 12, "12 steps = 2 passes over 100 rows"),  # 200 rows are 12 batches of 16 and 8 rows
        (1, 32, 2, "2 steps = 1 pass over 32 rows"),
        (0.5, 100, 3, "3 steps = 0.5 passes over 100 rows"),
        (0.32, 100, 2, "2 steps = 0.32 passes over 100 rows"),
        (0.57, 100 * 16, 57, "57 steps = 0.57 passes over 1600 rows"),  # 0.57 * 1600 is less than 912 in floats
        (1, 3, 1, "1 step = 1 pass over 3 rows"),
    ],
)
def test_passes_become_steps(passes: float, num_rows: int, steps: int, words: str) -> None:
    trainer = TrainerConfig(total_passes=passes, batch_prompts=16)
    assert trainer.describe_length(num_rows) == words
    resolved = trainer.over(num_rows)
    assert (resolved.num_steps, resolved.total_passes) == (steps, None)
    assert TrainerConfig.model_validate(resolved.model_dump()) == resolved
    assert resolved.over(7) == resolved
    assert resolved.describe_length(7) == words.partition(" = ")[0]


@pytest.mark.parametrize(
    ("model", "lr"),
    [
        ({"compute_bfloat16": True}, 1e-6),
        ({"dtype": "bfloat16", "lora_rank": 8}, 1e-6),  # an adapter is float32
        ({"dtype": "bfloat16", "lora_adapter_path": "adapter"}, 1e-6),
        ({"dtype": "bfloat16"}, 1e-4),
    ],
)
def test_bfloat16_is_for_what_does_not_train_and_for_large_steps(model: dict[str, Any], lr: float) -> None:
    values = _RUN | {"model": {"path": "m", **model}, "optimizer": {"lr": lr}}
    assert parse_config(LearnerConfig, values, "run.yaml").optimizer.lr == lr


@pytest.mark.parametrize(("lr", "at_least", "at_most"), [(1e-6, 0.0, 0.03), (_MIN_LR_BFLOAT16 * 1.01, 0.8, 1.0)])
def test_how_many_bfloat16_weights_a_step_of_adamw_moves(lr: float, at_least: float, at_most: float) -> None:
    torch.manual_seed(0)
    weights = torch.nn.Parameter((torch.randn(100_000) * 0.02).bfloat16())
    before = weights.detach().clone()
    weights.grad = torch.randn(100_000).bfloat16()
    torch.optim.AdamW([weights], lr=lr, weight_decay=0.0).step()
    assert at_least <= (weights != before).float().mean().item() <= at_most
