"""One rank of the parity suite: `... SEQUENCE MODES DIRECTORY...`, among torchrun's variables.

Each directory is of one family: its checkpoint in `model`, this rank's packs in `packs-<rank>.safetensors`, the adapter
in `adapter`. Each of MODES, names with commas, takes one step whose optimizer only looks at the gradients; rank 0
writes loss and gradients of each as `<mode>.json` and `<mode>.safetensors`. SEQUENCE ranks, neighbours, have the same
packs and share each of them.
"""

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from common.media.placeholders import placeholder_ids
from learner.batch.pack_bytes import decode_packs
from learner.config.algorithm import AlgorithmConfig
from learner.config.model import Adapter
from learner.model.load import load_policy
from learner.model.logprobs import completion_logprobs
from learner.model.parallelize import parallelize
from learner.model.parts import text_model
from learner.model.sequence_parallel import SequenceGroup, make_sequence_group, split_sequences
from learner.training.step import train_step
from tests.helpers.ranks import joined_over_gloo

LOSS = AlgorithmConfig(entropy_coef=0.01, clip_low=0.1, clip_high=0.2)
# Where rounding would move tokens over the clip, so that all of their gradient comes or goes.
UNCLIPPED = AlgorithmConfig(entropy_coef=0.01, clip_low=1.0, clip_high=1000.0)
MODES: Mapping[str, dict[str, Any]] = {
    "packed": {},
    "fused": {},
    "checkpointed": {"gradient_checkpointing": True},
    "lora": {"adapter": True},
    "bfloat16": {"compute_dtype": torch.bfloat16},
    "bfloat16-lora": {"dtype": torch.bfloat16, "adapter": True},
}


def loss_of(mode: str) -> AlgorithmConfig:
    """What it is trained with."""
    return UNCLIPPED if mode.startswith("bfloat16") else LOSS


class Recorder(torch.optim.Optimizer):
    """An optimizer that leaves the parameters alone and keeps their whole gradients."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.gradients: dict[str, torch.Tensor] = {}
        super().__init__([p for p in model.parameters() if p.requires_grad], {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                self.gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def main(sequence: int, modes: str, *directories: Path) -> None:
    with joined_over_gloo() as (rank, world):
        mesh = init_device_mesh("cpu", (world,))
        group = make_sequence_group("cpu", world, sequence)
        for directory in directories:
            for mode in modes.split(","):
                run_mode(directory, mode, dict(MODES[mode]), rank, mesh, group)


def run_mode(
    directory: Path, mode: str, settings: dict[str, Any], rank: int, mesh: DeviceMesh, group: SequenceGroup | None
) -> None:
    if settings.pop("adapter", False):
        settings["adapter"] = Adapter(path=directory / "adapter")
    compute_dtype = settings.pop("compute_dtype", None)
    model, _ = load_policy(directory / "model", **settings)
    split_sequences(model, text_model(model), group)
    parallelize(model, mesh, compute_dtype=compute_dtype)
    recorder = Recorder(model)
    stats = train_step(
        model,
        recorder,
        decode_packs(load_file(directory / f"packs-{rank}.safetensors")["packs"]),
        loss_of(mode),
        policy_version=0,
        forward=partial(
            completion_logprobs,
            suppressed_token_ids=placeholder_ids(model.config),
            fused=mode == "fused",
            sequence_group=group,
        ),
        num_copies=group.size if group is not None else 1,
        max_grad_norm=1e9,
    )
    if rank == 0:
        (directory / f"{mode}.json").write_text(json.dumps({"loss": stats.loss, "parity": stats.parity_max_abs_diff}))
        save_file(
            {name: value.contiguous() for name, value in recorder.gradients.items()}, directory / f"{mode}.safetensors"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:]))
