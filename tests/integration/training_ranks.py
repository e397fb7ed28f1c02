"""One rank of a training run: `... MODEL CASE...`, among torchrun's variables.

For each case, a directory, it reads its packs as the transport sends them, takes three steps under FSDP2 on Gloo and
writes its statistics; rank 0 writes the full parameters too. The name of the directory says what is special: `sgd...`,
`adamw...` or `frozen...` (vision tower, with AdamW), `...fused` (logprobs from hidden states), `...hybrid` (two ranks
for each copy of the parameters).
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from learner.batch.pack_bytes import decode_packs
from learner.config.algorithm import AlgorithmConfig
from learner.config.optimizer import OptimizerConfig
from learner.model.load import load_policy
from learner.model.logprobs import completion_logprobs
from learner.model.optimizer import build_optimizer
from learner.model.parallelize import parallelize
from learner.training.distributed import make_mesh
from learner.training.step import train_step
from tests.helpers.enlarged import enlarge
from tests.helpers.ranks import joined_over_gloo

NUM_STEPS = 3
LOSS = AlgorithmConfig(entropy_coef=0.01)


def main(model_dir: Path, *cases: Path) -> None:
    with joined_over_gloo() as (rank, world):
        for case in cases:
            run_case(rank, make_mesh("cpu", world, 2 if "hybrid" in case.name else None), model_dir, case)


def run_case(rank: int, mesh: DeviceMesh, model_dir: Path, case: Path) -> None:
    model = enlarge(load_policy(model_dir, frozen=["vision_tower"] if case.name.startswith("frozen") else [])[0])
    parallelize(model, mesh, cpu_offload="offloaded" in case.name)
    # SGD where parameters are compared: Adam makes much of rounding where a gradient is nearly zero.
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if not case.name.startswith("sgd"):
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, weight_decay=0.01))
    batches = decode_packs(load_file(case / f"{rank}.safetensors")["packs"])
    forward = partial(completion_logprobs, fused=case.name.endswith("fused"))
    options: dict[str, Any] = {"max_grad_norm": 0.05, "forward": forward}
    stats = [asdict(train_step(model, optimizer, batches, LOSS, policy_version=0, **options)) for _ in range(NUM_STEPS)]
    (case / f"{rank}.json").write_text(json.dumps(stats))
    full = {name: value.full_tensor() for name, value in model.named_parameters() if isinstance(value, DTensor)}
    if rank == 0:
        save_file({name: value.clone() for name, value in full.items()}, case / "parameters.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
