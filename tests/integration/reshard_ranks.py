"""One rank of a run that saves a checkpoint, or goes on from it, and steps once more: `... RUN_DIR MODEL OUTPUT`.

Among torchrun's variables. Gradients are made up, the same for any number of ranks. Rank 0 writes to OUTPUT, a file of
safetensors, what the parameters are in the end. A run folder that is not there yet is made, and its checkpoint saved
before the last step.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import distribute_tensor

from learner.config import LearnerConfig
from learner.training.distributed import join_ranks
from learner.training.policy import Policy


def main(run_dir: Path, model_dir: Path, output: Path) -> None:
    torch.set_num_threads(1)
    config = LearnerConfig.model_validate(
        {
            "model": {"path": model_dir, "lora_rank": 4},
            "data": {"train": "unused"},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
            "trainer": {"total_steps": 9, "batch_prompts": 1, "device": "cpu"},
        }
    )
    with join_ranks("cpu") as ranks:
        policy = Policy(config, ranks)
        if policy.restore(run_dir) is None:
            step(policy)
            step(policy)
            policy.save(run_dir, {})
            policy.finish()
        step(policy)
        whole = {name: value.full_tensor().detach().clone() for name, value in training(policy)}
        if ranks.is_main:
            save_file(whole, output)


def training(policy: Policy) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in policy.model.named_parameters() if value.requires_grad]


def step(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(policy.version)
    for _, parameter in training(policy):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
    policy._optimizer.step()
    policy._optimizer.zero_grad()
    policy.version += 1


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
