"""FSDP2 from outside: shards a model that knows nothing of it.

Each decoder layer of the text model and each block of the vision tower is one unit; the root takes the rest. All ranks
must run every unit in every micro-batch, in the same order: packs without media carry a filler image for that.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from learner.model.parts import find_modules, text_model


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype | None = None,
    compile_layers: bool = False,
    cpu_offload: bool = False,
) -> None:
    """Shard `model` over a mesh, in place. Gloo on CPUs and NCCL on GPUs; one rank works too.

    Over a mesh of two dimensions parameters are sharded along the second and copied along the first.

    Call it before the optimizer is made: parameters become DTensors.

    Args:
        model: as `load_policy` returns it; its parameters are moved to the mesh's device.
        mesh: of all ranks.
        compute_dtype: parameters are gathered in this dtype (bfloat16 while float32 ones are updated), gradients are
            reduced in float32. `None`: as they are stored.
        compile_layers: each unit goes through torch.compile, all but its attention over the pack.
        cpu_offload: shards, their gradients and so the optimizer stay in CPU memory; a unit is on the GPU
            while it runs.
    """
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype is not None else None
    )
    for unit in fsdp_units(model):
        if compile_layers:
            unit.compile(dynamic=True)
        fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)


def compute_device(model: nn.Module) -> torch.device:
    """Where the forward pass runs: the device of the parameters, or, if these are offloaded, of their mesh."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != parameter.device.type:
        return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())
    return parameter.device


def fsdp_units(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers: the members of each outermost module list in the text model and in the vision towers."""
    parents = [model.get_submodule(name) for name in find_modules(model, "vision_tower")]
    for parent in (*parents, text_model(model)):
        yield from _layers(parent)


def _layers(parent: nn.Module) -> Iterator[nn.Module]:
    for child in parent.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)
