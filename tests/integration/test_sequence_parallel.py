"""Ranks that share sequences, through the whole trainer: steps, layouts and memory. Parity is in test_family_parity."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from examples.digits.model import build_model
from learner.model.load import load_policy
from tests.helpers.enlarged import enlarge
from tests.helpers.ranks import run_ranks

MAX_TOKENS = 120
# Ranks, trainer.sequence_parallel_size, trainer.fsdp_size.
LAYOUTS: dict[str, tuple[int, int, int | None]] = {
    "alone": (1, 1, None),
    "pair": (2, 2, None),
    "pairs-hybrid": (4, 2, 2),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build_model(tmp_path_factory.mktemp("tiny"), seed=0)
    enlarge(model := load_policy(directory)[0])
    model.config.get_text_config()._attn_implementation = "sdpa"
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Callable[[str], dict[str, Any]]:
    """What the trainer did on a layout, with the final weights; it is run once."""
    directory = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name: str) -> dict[str, Any]:
        train(directory / f"{name}.json", model_dir, *LAYOUTS[name])
        result: dict[str, Any] = json.loads((directory / f"{name}.json").read_text())
        return result | {"weights": load_file(directory / name / "export" / "model.safetensors")}

    return run


def train(output: Path, model_dir: Path, num_ranks: int, sequence_size: int, shard_ranks: int | None) -> None:
    config = {
        "model": {"path": str(model_dir)},
        "data": {"train": "unused"},
        "trainer": {
            "device": "cpu",
            "total_steps": 1,
            "batch_prompts": 4,
            "mini_batch_prompts": 1,  # so that a group of ranks has nothing to train in some
            "epochs": 2,
            "max_mean_parity_diff": None,  # the logprobs are made up
            "fsdp_size": shard_ranks,
            "sequence_parallel_size": sequence_size,
            "max_tokens_per_micro_batch": MAX_TOKENS // sequence_size,
        },
        "optimizer": {"lr": 1e-3, "max_grad_norm": 0.5},
        "algorithm": {"kl_coef": 0.1, "old_policy": "learner", "entropy_coef": 0.01},
    }
    run_ranks(num_ranks, "tests.integration.sequence_ranks", str(output), json.dumps(config))


@pytest.mark.parametrize("name", ["pair", pytest.param("pairs-hybrid", marks=pytest.mark.slow)])
def test_the_trainer_takes_the_same_steps(run: Callable[[str], dict[str, Any]], name: str) -> None:
    """Four mini-batches and two epochs, with a reference policy and the old policy's logprobs."""
    (step,), (expected,) = run(name)["steps"], run("alone")["steps"]
    assert expected["grad_norm"] > 0.5  # so that clipping is part of what is compared
    assert expected["reference_kl"] > 1e-4
    # Each once, in whatever epochs; and there are logprobs of the policy before the batch for all of them.
    counts = {"num_tokens": 31, "num_sequences": 11, "parity_tokens": 31, "num_updates": 8, "num_skipped": 0}
    assert {key: step[key] for key in counts} == {key: expected[key] for key in counts} == counts
    for key in ("loss", "grad_norm", "entropy", "mismatch_kl", "reference_kl", "ratio_mean", "parity_max_abs_diff"):
        assert step[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key
    if name == "pair":  # four ranks have more packs, and so more fillers
        assert step["num_input_tokens"] == expected["num_input_tokens"]
    for key, value in run(name)["weights"].items():
        # Adam makes much of rounding where a gradient is nearly zero.
        torch.testing.assert_close(value, run("alone")["weights"][key], atol=2e-3, rtol=0)


def test_the_layers_see_a_share_of_the_tokens_and_keep_a_share_of_the_memory(
    run: Callable[[str], dict[str, Any]],
) -> None:
    (total, _), whole = run("alone")["tokens_of_layers"], run("alone")["bytes_kept"]
    assert total % 2  # so that the last rank has one token less
    assert run("pair")["tokens_of_layers"] == [total // 2 + 1] * 2
    # The vision tower, the embeddings and the last hidden states are those of the whole pack.
    assert run("pair")["bytes_kept"] < 0.58 * whole
