"""What vLLM's reload of weights leaves out on CPUs, where layers compute with packed copies of their parameters."""

from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform


class CpuReload:
    """One reload of one model: `begin` before vLLM's own, `end` behind it. Nothing to do on other devices."""

    def __init__(self) -> None:
        self._kernels: list[tuple[Any, Any]] = []

    def begin(self, model: torch.nn.Module) -> None:
        """Have experts packed anew: vLLM does so only for those that have no kernel yet."""
        if not current_platform.is_cpu():
            return
        for layer in model.modules():
            method: Any = getattr(layer, "quant_method", None)
            kernel = getattr(method, "moe_kernel", None)
            if kernel is not None:
                self._kernels.append((method, kernel))
                method.moe_kernel = None

    def end(self, model: torch.nn.Module) -> None:
        """Give experts that were not loaded their kernel back; pack a head that shares the weight of the embedding."""
        if not current_platform.is_cpu():
            return
        for method, kernel in self._kernels:
            if method.moe_kernel is None:
                method.moe_kernel = kernel
        self._kernels.clear()
        layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
        heads = [layer for layer in layers if isinstance(layer, ParallelLMHead)]
        shared = {layer.weight.data_ptr() for layer in layers if layer not in heads}
        for head in heads:
            if head.weight.data_ptr() in shared:
                head.quant_method.process_weights_after_loading(head)
