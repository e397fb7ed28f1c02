"""One rank of two that resume, the second of which sees an old listing of the checkpoints: `... RUN_DIR MODEL`.

Among torchrun's variables. Each rank writes the version that it has resumed at, and the sum of what trains.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from learner.config import LearnerConfig
from learner.training.distributed import join_ranks
from learner.training.policy import Policy


def main(run_dir: Path, model_dir: Path) -> None:
    torch.set_num_threads(1)
    config = LearnerConfig.model_validate(
        {
            "model": {"path": model_dir},
            "data": {"train": "unused"},
            "trainer": {"total_steps": 9, "batch_prompts": 1, "device": "cpu"},
        }
    )
    with join_ranks("cpu") as ranks:
        policy = Policy(config, ranks)
        for policy.version in (1, 2):
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.fill_(policy.version)
            policy.save(run_dir, {})
        policy.finish()
        torch.distributed.barrier()
        newest = run_dir / "checkpoints" / f"step-{2 - ranks.rank:06}"
        with patch("learner.training.policy.latest_checkpoint", return_value=newest):
            again = Policy(config, ranks)
            state = again.restore(run_dir)
        values = {
            value for parameter in again.model.parameters() for value in parameter.full_tensor().unique().tolist()
        }
        seen = {"state": state, "version": again.version, "values": sorted(values)}
        (run_dir / f"{ranks.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
