"""Every algorithm learns to read: the demo's model and data, real vLLM actors, held-out accuracy after a few steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.digits.prepare import prepare
from tests.helpers.launched import free_ports, launching, run_dirs

NUM_STEPS = 60
ENOUGH = 0.85

# The recipes of docs/algorithms.md, their constants for answers of at most four tokens.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": {"advantage": "grpo", "aggregation": "seq-mean-token-mean"}},
    "dr_grpo": {
        "algorithm": {
            "advantage": "dr_grpo",
            "aggregation": "seq-mean-token-sum-norm",
            "max_completion_tokens": 2,
        }
    },
    "dapo": {
        "algorithm": {"advantage": "grpo", "aggregation": "token-mean", "clip_high": 0.28, "overlong_buffer": 2},
        "rollout": {"drop_uniform_groups": True},
    },
    "rloo": {"algorithm": {"advantage": "rloo", "old_policy": "learner"}},
    "reinforce_plus_plus": {"algorithm": {"advantage": "reinforce_plus_plus", "aggregation": "token-mean"}},
    "gspo": {
        "algorithm": {
            "policy_loss": "gspo",
            "aggregation": "seq-mean-token-mean",
            "clip_low": 0.0003,
            "clip_high": 0.0004,
        }
    },
    "cispo": {"algorithm": {"policy_loss": "cispo", "clip_low": 1.0, "clip_high": 5.0}},
    "mini_batches": {"trainer": {"mini_batch_prompts": 32, "epochs": 2}},
    # In the vision tower too: it has to learn to tell strokes apart.
    "lora": {
        "model": {
            "lora_rank": 16,
            "lora_alpha": 32,
            "target_modules": r".*\.(qkv|[qkvo]_proj|(attn\.|gate_|up_|down_)proj|mlp\.[02])",
        },
        "optimizer": {"lr": 5.0e-3},
    },
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's warm start."""
    return prepare(tmp_path_factory.mktemp("warm") / "model", seed=0)


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithm_reaches_its_accuracy(algorithm: str, model_dir: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(Path("examples/digits/config.yaml").read_text())
    config["model"]["path"] = str(model_dir)
    config["trainer"] |= {"total_steps": NUM_STEPS, "eval_every": 0, "checkpoint_every": 0}
    config["algorithm"] = {"entropy_coef": config["algorithm"]["entropy_coef"]}
    for section, values in ALGORITHMS[algorithm].items():
        config[section] |= values
    config["local"]["base_port"] = free_ports(2)
    config["runs_dir"] = str(tmp_path / "runs")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with launching(tmp_path / "output") as launch:
        launched = launch("--config", str(tmp_path / "config.yaml"))
        assert launched.exit_code(600) == 0, launched.said()
        [run_dir] = run_dirs(tmp_path / "runs")
        summary = json.loads((run_dir / "summary.json").read_text())
        print(f"{algorithm}: {summary['accuracy_before']:.1%} -> {summary['accuracy_after']:.1%}")
        assert summary["accuracy_before"] < 0.5
        assert summary["accuracy_after"] >= ENOUGH
        assert summary["parity_max_abs_diff"] <= 1e-4
