"""LoRA adapters inside a vLLM worker: received like weights, kept in memory, put into vLLM when a batch wants them.

vLLM loads an adapter from the directory that a request names, at the first batch with it and again after each update of
the base model. Here the worker's adapter manager is handed what came over the wire instead.
"""

from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper import punica_cpu
from vllm.lora.request import LoRARequest

from actor.weights.transfer import NamedTensors
from common.errors import InvalidRequest

# An id that vLLM asks for; a clone gets the one of its request.
_ANY_ID = 1


class WorkerAdapters:
    """The adapters of one worker, by name; `lora_manager` is vLLM's `WorkerLoRAManager`."""

    def __init__(self, lora_manager: Any) -> None:
        self._manager = lora_manager
        self._adapters: dict[str, LoRAModel] = {}
        lora_manager._load_adapter = self._load  # noqa: SLF001 - it only knows how to read files
        _spare_rows_without_adapter()

    def build(self, tensors: NamedTensors) -> LoRAModel:
        """An adapter as vLLM has it. Raises InvalidRequest if the model has no such modules."""
        manager = self._manager._adapter_manager  # noqa: SLF001
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        rank = max(tensor.shape[0] for name, tensor in tensors if name.endswith(".lora_A.weight"))
        adapter = LoRAModel.from_lora_tensors(
            _ANY_ID,
            dict(tensors),
            # The scaling is in B already.
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
            device="cpu",
            dtype=self._manager.lora_config.lora_dtype,
            model_vocab_size=self._manager.vocab_size,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        )
        packed = manager.packed_modules_mapping
        known = {
            f"{name.rpartition('.')[0]}.{part}" if name.rpartition(".")[0] else part
            for name in manager.modules
            for part in packed.get(name.rpartition(".")[2], [name.rpartition(".")[2]])
        }
        if unknown := sorted(adapter.loras.keys() - known):
            raise InvalidRequest("manifest.adapter", f"{unknown[0]}: vLLM applies no adapter there; merge it")
        return adapter

    def commit(self, name: str, adapter: LoRAModel | None, *, base_changed: bool) -> None:
        """From now on `name` is this adapter. A new base model voids all others."""
        if base_changed:
            self._adapters.clear()
        if adapter is not None:
            self._adapters[name] = adapter
        self._manager.remove_all_adapters()  # those that are still wanted come back with the next batch

    def _load(self, request: LoRARequest) -> LoRAModel:
        """What vLLM puts into the model for a request; zeros for one whose adapter has become void under way."""
        adapter = self._adapters.get(request.lora_name)
        if adapter is not None:
            return adapter.clone(request.lora_int_id)
        manager = self._manager
        zeros: LoRAModel = manager._adapter_manager.create_dummy_lora(request.lora_int_id, 1, manager.embedding_modules)  # noqa: SLF001
        return zeros


def _spare_rows_without_adapter() -> None:
    """Repair vLLM's LoRA kernels for the CPU: a row without adapter has the index -1, and gets the last adapter there.

    Only batches of a single row, and those in which the last slot happens to be empty, are right without this.
    """
    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = _shrink


_vllm_shrink = lora_ops.bgmv_shrink


def _shrink(
    inputs: torch.Tensor, matrices: torch.Tensor, output: torch.Tensor, indices: torch.Tensor, scaling: float = 1.0
) -> None:
    """A x of each row `[rows, rank]`, into `output`; zeros for rows without adapter."""
    _vllm_shrink(inputs, matrices, output, indices, scaling)
    output[indices < 0] = 0
