"""Memory that an update takes beside the model.

Of a GPU, which vLLM must not fill with its cache: a second set of layers (`actor.engine_vllm.shadow`), the two buffers
that take turns on the wire (`actor.weights.transfer`), and NCCL's own. Of the host, where there is no second set: the
update.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from actor.weights.transfer import NUM_BUFFERS
from common.config import ConfigError

# A buffer holds a bucket (`weights.bucket_mib` of the learner, by default), or one tensor that is larger, as float32.
_BUCKET_BYTES = 64 * 2**20
_WIRE_BYTES = 4
_GIB = 2**30
# What a communicator takes from the GPU, outside torch's allocator: buffers by channel and neighbour, and kernels. It
# depends on GPUs and network, some hundred MiB as a rule; NCCL does not say it before it takes it.
_NCCL_BYTES = _GIB
_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of versions 2 and 1


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
    room = has_second_set * weights + NUM_BUFFERS * max(_BUCKET_BYTES, _WIRE_BYTES * max(sizes)) + _NCCL_BYTES
    left = wanted - room / total_bytes
    if left * total_bytes <= weights:
        raise ConfigError(
            f"vllm.gpu_memory_utilization: {wanted:g} of {total_bytes / _GIB:.0f} GiB has no room for the model "
            f"({weights / _GIB:.1f} GiB) with its updates ({room / _GIB:.1f} GiB more); spread it over more GPUs with "
            "vllm.tensor_parallel_size"
        )
    return left


def check_host_room(model: Path, *, num_workers: int, limit_bytes: int) -> None:
    """For a model without a second set, of which each worker keeps a whole update (`shadow.ReloadedModel`).

    Raises:
        ConfigError: the first update would have the actor killed: in the dtype of the checkpoint it takes more than
            `limit_bytes`. One in float32 takes more than is counted here.
    """
    update = sum(path.stat().st_size for path in _files(model))
    if num_workers * update > limit_bytes:
        raise ConfigError(
            f"model: each of {num_workers} workers keeps an update of {update / _GIB:.1f} GiB in the host's memory, as "
            f"experts and quantized layers need it, {num_workers * update / _GIB:.1f} GiB in all, and there are "
            f"{limit_bytes / _GIB:.1f} GiB; raise the container's memory, or lower vllm.tensor_parallel_size"
        )


def host_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that this process and its children may use: of its container, or of the machine."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    said = [path.read_text().strip() for path in (cgroup / name for name in _LIMITS) if path.is_file()]
    return min([machine, *(int(limit) for limit in said if limit != "max")])


def _files(model: Path) -> list[Path]:
    """Of a checkpoint, but for the same once more, as Mistral names it."""
    return [path for path in model.glob("*.safetensors") if not path.name.startswith("consolidated")]


def _num_elements(model: Path) -> Iterator[int]:
    """Of each tensor of a checkpoint, from the headers of its files."""
    from safetensors import safe_open

    for path in _files(model):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                yield math.prod(file.get_slice(name).get_shape())
