"""What runs inside vLLM's worker processes: staging of weights, the swap, and the mask over placeholder tokens.

`WorkerExtension` adds the calls of the stage phase to vLLM's worker (reached by `collective_rpc`); they only start and
watch a background job, so that generation goes on. `StagedWeightTransfer` is the swap, in the form that vLLM's weight
transfer registry asks for: by then everything has been received and verified, and the load is a memory copy.
"""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from actor.transfer import WeightReceiver
from actor.vllm_cpu_reload import CpuReload
from common.placeholders import placeholder_ids
from common.types import EpochSpec, Manifest, ManifestBucket, ManifestParameter


@dataclass
class CommitInfo(WeightTransferUpdateInfo):
    """The one argument of a swap."""

    policy_version: int


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """Epochs are joined through `WorkerExtension`, in the background."""


class StagedWeightTransfer(WeightTransferEngine[NoInitInfo, CommitInfo]):
    """Loads a staged update into the live model, between vLLM's `start_` and `finish_weight_update`."""

    init_info_cls = NoInitInfo
    update_info_cls = CommitInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.receiver = WeightReceiver(device)
        self._on_cpu = CpuReload()

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        """Nothing to do: see `WorkerExtension.join_epoch`."""

    def start_weight_update(self) -> None:
        """vLLM repacks parameters after loading; this gives each layer its loadable form back, layer by layer."""
        self._on_cpu.begin(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: CommitInfo) -> None:
        """Load what was staged for this version."""
        with torch.inference_mode():
            self.model.load_weights(self.receiver.take(update_info.policy_version))

    def finish_weight_update(self) -> None:
        """Repack the layers that changed."""
        finalize_layerwise_reload(self.model, self.model_config)
        self._on_cpu.end(self.model)

    def shutdown(self) -> None:
        """Leave the epoch."""
        self.receiver.leave()


class WorkerExtension:
    """Calls that vLLM's worker class gains; `self` is the worker. One job at a time."""

    rank: int
    weight_transfer_engine: StagedWeightTransfer
    _job: "Future[Any]"

    def join_epoch(self, spec: dict[str, Any]) -> None:
        """Start joining a broadcast group; `job_result` tells when it is done."""
        first_rank = EpochSpec(**spec)
        self._job = self.weight_transfer_engine.receiver.join(first_rank, first_rank.rank + self.rank)

    def stage_weights(self, manifest: dict[str, Any]) -> None:
        """Start receiving an update."""
        self._job = self.weight_transfer_engine.receiver.receive(_manifest_from_dict(manifest))

    def job_result(self) -> dict[str, Any]:
        """`{"done": False}`, or the job's result or error as plain values."""
        if not self._job.done():
            return {"done": False}
        error = self._job.exception()
        if error is not None:
            return {"done": True, "error": f"{type(error).__name__}: {error}"}
        return {"done": True, "error": None, "result": self._job.result()}

    def leave_epoch(self) -> None:
        """Drop what is staged and leave the group; ends a job under way."""
        self.weight_transfer_engine.receiver.leave()


class SuppressPlaceholders(LogitsProcessor):
    """Gives media placeholder ids probability 0, so that no completion holds an image that does not exist."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._ids = torch.tensor(placeholder_ids(vllm_config.model_config.hf_config), dtype=torch.long, device=device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits`: [num_requests, vocab], changed in place."""
        return logits.index_fill_(1, self._ids, -float("inf"))

    def is_argmax_invariant(self) -> bool:
        """A placeholder can be the most likely token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """The mask is the same for every request."""


def _manifest_from_dict(fields: dict[str, Any]) -> Manifest:
    parameters = tuple(
        ManifestParameter(**{**parameter, "shape": tuple(parameter["shape"])}) for parameter in fields["parameters"]
    )
    buckets = tuple(ManifestBucket(**bucket) for bucket in fields["buckets"])
    return Manifest(**{**fields, "parameters": parameters, "buckets": buckets})
