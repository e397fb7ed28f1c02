"""vLLM's own transfer of weights, parameter by parameter, over Gloo: its NCCL engine with another wire, for CPUs.

`WorkerExtension` brings it into vLLM's worker process. Layers are given back their loadable form, loaded and packed
anew by vLLM itself; `actor.engine_vllm.cpu_reload` does what it leaves out on CPUs, for both sides alike.
"""

from typing import Any

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

from actor.engine_vllm.cpu_reload import CpuReload
from common.collective import BroadcastGroup
from common.types import EpochSpec

BACKEND = "gloo"


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """As the one of which it is made."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._group: BroadcastGroup | None = None
        self._on_cpu = CpuReload()

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Join the trainer's group."""
        host, port = init_info.master_address, init_info.master_port
        assert host is not None
        assert port is not None
        self._group = BroadcastGroup(group_spec(host, port), 1)

    def start_weight_update(self) -> None:
        """See `WeightTransferEngine`."""
        self._on_cpu.begin(self.model)
        super().start_weight_update()

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """As `NCCLWeightTransferEngine` does it unpacked."""
        assert self._group is not None
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self._group.broadcast(weight.view(-1).view(torch.uint8))
            self.model.load_weights([(name, weight)])

    def finish_weight_update(self) -> None:
        """See `WeightTransferEngine`."""
        super().finish_weight_update()
        self._on_cpu.end(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.abort()


class WorkerExtension:
    """Nothing: that vLLM imports this module for it is enough."""


def group_spec(host: str, port: int) -> EpochSpec:
    """The trainer, which is rank 0, and the one worker."""
    return EpochSpec("per_parameter", 1, host, port, 2, 0, "gloo", 120.0)


WeightTransferEngineFactory.register_engine(BACKEND, GlooWeightTransferEngine)
