"""Which GPUs the single-machine launcher gives to whom: the first to the learner's ranks, then each actor its own."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import ConfigError
from learner.config import LearnerConfig


@dataclass(frozen=True, slots=True)
class GpuShares:
    """Values of CUDA_VISIBLE_DEVICES. `learner` is None, and `actors` empty, for those who use none, or share all."""

    learner: tuple[str, ...] | None = None
    actors: tuple[tuple[str, ...], ...] = ()


def share_gpus(config: LearnerConfig) -> GpuShares:
    """The shares on this machine. Raises ConfigError if there are too few."""
    return shares_of(config, visible_gpus())


def shares_of(config: LearnerConfig, gpus: Sequence[str]) -> GpuShares:
    """As `share_gpus`, of these.

    Example: of "0" to "3", one rank gets "0" and two actors of one GPU "1" and "2".
    """
    if not gpus:
        return GpuShares()
    local, actor = config.local, config.local.actor
    num_ranks = 0 if config.trainer.device == "cpu" else local.num_ranks
    size = 0 if actor.get("engine", "vllm") != "vllm" else actor.get("vllm", {}).get("tensor_parallel_size", 1)
    needed = num_ranks + local.num_actors * size
    if needed > len(gpus):
        if config.weights.backend == "gloo":  # NCCL takes no two members on one GPU
            return GpuShares()
        raise ConfigError(
            f"local: {num_ranks} ranks and {local.num_actors} actors of {size} GPUs need {needed} GPUs, and there are "
            f"{len(gpus)}; set local.num_ranks, local.num_actors or trainer.device=cpu, or have them share with "
            "weights.backend=gloo and a small local.actor.vllm.gpu_memory_utilization"
        )
    starts = range(num_ranks, needed, size) if size else ()
    return GpuShares(
        tuple(gpus[:num_ranks]) if num_ranks else None,
        tuple(tuple(gpus[start : start + size]) for start in starts),
    )


def visible_gpus() -> tuple[str, ...]:
    """Those that torch sees here, by the names that CUDA_VISIBLE_DEVICES has for them."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return ()  # and no seconds are spent on importing torch
    import torch

    num_gpus = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(named[:num_gpus] or map(str, range(num_gpus)))
