"""What runs inside vLLM's worker processes: staging of weights, and the swap.

`WorkerExtension` adds the calls of the stage phase to vLLM's worker (reached by `collective_rpc`); they only start and
watch a background job, so that generation goes on. `StagedWeightTransfer` is the swap, in the form that vLLM's weight
transfer registry asks for: by then everything has been received, verified and processed, and what is left is a copy.
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

from actor.engine_vllm.shadow import ReloadedModel, ShadowModel, can_shadow
from actor.engine_vllm.worker_adapters import WorkerAdapters
from actor.weights.transfer import NamedTensors, WeightReceiver
from common.errors import InvalidRequest
from common.types import EpochSpec, Manifest, ManifestBucket, ManifestParameter, is_lora


@dataclass
class CommitInfo(WeightTransferUpdateInfo):
    """The one argument of a swap."""

    policy_version: int


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """Epochs are joined through `WorkerExtension`, in the background."""


class StagedWeightTransfer(WeightTransferEngine[NoInitInfo, CommitInfo]):
    """Swaps a staged update into the live model, between vLLM's `start_` and `finish_weight_update`."""

    init_info_cls = NoInitInfo
    update_info_cls = CommitInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.receiver = WeightReceiver(device)
        self.adapters: WorkerAdapters | None = None
        self._can_shadow = can_shadow(model)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        """Nothing to do: see `WorkerExtension.join_epoch`."""

    def stage(self, manifest: Manifest) -> "Future[tuple[int, ...]]":
        """Start receiving an update."""
        model = self._next_model() if manifest.updates_base else None
        return self.receiver.receive(manifest, StagedUpdate(manifest, model, self.adapters))

    def _next_model(self) -> ShadowModel | ReloadedModel:
        if self._can_shadow:
            return ShadowModel(self.model, self.vllm_config, self._stream)
        return ReloadedModel(self.model, self.vllm_config)

    def start_weight_update(self) -> None:
        """Nothing to do: all has been prepared."""

    def receive_weights(self, update_info: CommitInfo) -> None:
        """Make live what was staged for this version."""
        self.receiver.take(update_info.policy_version, StagedUpdate).swap()

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Leave the epoch."""
        self.receiver.leave()


class StagedUpdate:
    """One update on its way: weights of the model, an adapter, or both."""

    def __init__(
        self, manifest: Manifest, model: ShadowModel | ReloadedModel | None, adapters: WorkerAdapters | None
    ) -> None:
        self._manifest = manifest
        self._model = model
        self._adapters = adapters
        self._lora: list[tuple[str, torch.Tensor]] = []
        self._adapter: Any = None

    def add(self, tensors: NamedTensors) -> None:
        """See `Staging.add`."""
        lora = [(name, tensor) for name, tensor in tensors if self._manifest.adapter and is_lora(name)]
        self._lora += [(name, tensor.to("cpu", copy=True)) for name, tensor in lora]
        if self._model is not None and len(lora) < len(tensors):
            names = {name for name, _ in lora}
            self._model.add([(name, tensor) for name, tensor in tensors if name not in names])

    def finish(self) -> None:
        """See `Staging.finish`. Raises InvalidRequest and ValueError for what the model cannot take."""
        if self._model is not None:
            self._model.finish()
        if self._lora:
            assert self._adapters is not None  # the engine has refused it otherwise
            self._adapter = self._adapters.build(self._lora)

    def discard(self) -> None:
        """See `Staging.discard`."""
        if self._model is not None:
            self._model.discard()
        self._lora.clear()
        self._adapter = None

    def swap(self) -> None:
        """Make it live."""
        if self._model is not None:
            self._model.swap()
        if self._adapters is not None:
            self._adapters.commit(self._manifest.adapter, self._adapter, base_changed=self._model is not None)


class WorkerExtension:
    """Calls that vLLM's worker class gains; `self` is the worker. One job at a time."""

    rank: int
    model_runner: Any
    weight_transfer_engine: StagedWeightTransfer
    _job: "Future[Any]"

    def take_adapters(self) -> None:
        """From now on adapters come through the weight service."""
        self.weight_transfer_engine.adapters = WorkerAdapters(self.model_runner.lora_manager)

    def join_epoch(self, spec: dict[str, Any]) -> None:
        """Start joining a broadcast group; `job_result` tells when it is done."""
        first_rank = EpochSpec(**spec)
        self._job = self.weight_transfer_engine.receiver.join(first_rank, first_rank.rank + self.rank)

    def stage_weights(self, manifest: dict[str, Any]) -> None:
        """Start receiving an update."""
        self._job = Future()
        try:
            self._job = self.weight_transfer_engine.stage(_manifest_from_dict(manifest))
        except InvalidRequest as error:
            self._job.set_exception(error)

    def job_result(self) -> dict[str, Any]:
        """`{"done": False}`, or the job's result or error as plain values (`field`: of the manifest, if at fault).

        `blocked`: see `BroadcastGroup.is_blocked`.
        """
        blocked = self.weight_transfer_engine.receiver.is_blocked
        if not self._job.done():
            return {"done": False, "blocked": blocked}
        error = self._job.exception()
        if error is None:
            return {"done": True, "error": None, "result": self._job.result()}
        field = error.field if isinstance(error, InvalidRequest) else None
        message = str(error).removeprefix(f"{field}: ")
        return {"done": True, "error": message, "kind": type(error).__name__, "field": field, "blocked": blocked}

    def leave_epoch(self) -> None:
        """Drop what is staged and leave the group; ends a job under way."""
        self.weight_transfer_engine.receiver.leave()


def _manifest_from_dict(fields: dict[str, Any]) -> Manifest:
    parameters = tuple(
        ManifestParameter(**{**parameter, "shape": tuple(parameter["shape"])}) for parameter in fields["parameters"]
    )
    buckets = tuple(ManifestBucket(**bucket) for bucket in fields["buckets"])
    return Manifest(**{**fields, "parameters": parameters, "buckets": buckets})
