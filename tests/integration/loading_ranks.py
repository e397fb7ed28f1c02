"""One rank of two that load: `... DIRECTORY MODEL`, among torchrun's variables.

Each rank writes when it began to load and when all of it was sharded; then what it did in a turn that rank 0 failed in.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from learner.config import LearnerConfig
from learner.model.load import load_policy
from learner.training.distributed import Ranks, join_ranks
from learner.training.policy import Policy


def main(directory: Path, model_dir: Path) -> None:
    torch.set_num_threads(1)
    config = LearnerConfig.model_validate(
        {
            "model": {"path": model_dir},
            "data": {"train": "unused"},
            "trainer": {"total_steps": 1, "batch_prompts": 1, "device": "cpu"},
            "algorithm": {"kl_coef": 0.1},
        }
    )
    with join_ranks("cpu") as ranks:
        seen = {"loads": loads(config, ranks), "outcome": outcome_of_a_failed_turn(ranks)}
        (directory / f"{ranks.rank}.json").write_text(json.dumps(seen))


def loads(config: LearnerConfig, ranks: Ranks) -> list[tuple[str, float]]:
    """What began and ended when, on the machine's clock."""
    events: list[tuple[str, float]] = []

    def slow_load(*arguments: Any, **settings: Any) -> Any:
        events.append(("load", time.monotonic()))
        time.sleep(0.2)
        return load_policy(*arguments, **settings)

    shard = Policy._shard

    def seen_shard(*arguments: Any, **settings: Any) -> None:
        shard(*arguments, **settings)
        events.append(("sharded", time.monotonic()))

    with patch("learner.training.policy.load_policy", slow_load), patch.object(Policy, "_shard", seen_shard):
        Policy(config, ranks)
    return events


def outcome_of_a_failed_turn(ranks: Ranks) -> str:
    try:
        with ranks.in_turn():
            if ranks.is_main:
                raise ValueError("no checkpoint")
    except ValueError as error:
        return str(error)
    return "went on"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
