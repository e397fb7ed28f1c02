"""Memory of a GPU that an update takes beside the model, and that vLLM must not fill with its cache.

A second set of layers (`actor.engine_vllm.shadow`), and the two buffers that take turns on the wire (`actor.transfer`).
"""

import math
from collections.abc import Iterator
from pathlib import Path

from actor.transfer import NUM_BUFFERS
from common.config import ConfigError

# A buffer holds a bucket (`weights.bucket_mib` of the learner, by default), or one tensor that is larger, as float32.
_BUCKET_BYTES = 64 * 2**20
_WIRE_BYTES = 4
_GIB = 2**30


def utilization_beside_updates(
    model: Path, wanted: float, *, total_bytes: int, element_bytes: int, num_gpus: int, has_second_set: bool
) -> float:
    """The share of a GPU that is left to vLLM: `wanted`, without the room of an update.

    Args:
        model: checkpoint directory.
        wanted: share of the GPU for all of it.
        total_bytes: memory of one GPU.
        element_bytes: of one parameter, as the engine has it.
        num_gpus: over which the model is spread.
        has_second_set: whether an update is processed beside the model, not kept in the host's memory.

    Raises:
        ConfigError: not even the model would have room.
    """
    sizes = list(_num_elements(model))
    weights = sum(sizes) * element_bytes / num_gpus
    room = has_second_set * weights + NUM_BUFFERS * max(_BUCKET_BYTES, _WIRE_BYTES * max(sizes))
    left = wanted - room / total_bytes
    if left * total_bytes <= weights:
        raise ConfigError(
            f"vllm.gpu_memory_utilization: {wanted:g} of {total_bytes / _GIB:.0f} GiB has no room for the model "
            f"({weights / _GIB:.1f} GiB) with its updates ({room / _GIB:.1f} GiB more); spread it over more GPUs with "
            "vllm.tensor_parallel_size"
        )
    return left


def _num_elements(model: Path) -> Iterator[int]:
    """Of each tensor of a checkpoint, from the headers of its files."""
    from safetensors import safe_open

    for path in model.glob("*.safetensors"):
        if path.name.startswith("consolidated"):  # the same once more, as Mistral names it
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                yield math.prod(file.get_slice(name).get_shape())
