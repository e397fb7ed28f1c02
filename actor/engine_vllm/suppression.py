"""The mask over placeholder tokens, for either of vLLM's model runners: that of CPUs, and by default another on GPUs.

A module of its own: vLLM's front end imports it too, with the GPUs hidden.
"""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as GpuLogitsProcessor

from common.media.placeholders import placeholder_ids

# As vLLM names it.
SUPPRESSION = "actor.engine_vllm.suppression:SuppressPlaceholders"


class SuppressPlaceholders(LogitsProcessor, GpuLogitsProcessor):
    """Gives media placeholder ids probability 0, so that no completion holds an image that does not exist.

    Both runners apply it behind the grammar and the biases and before the temperature, so that processed logprobs are
    those of what is left.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool = False) -> None:
        """`device`: or the runner's state of its requests, which has one."""
        ids = placeholder_ids(vllm_config.model_config.hf_config)
        self._ids = torch.tensor(ids, dtype=torch.long, device=getattr(device, "device", device))

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """`logits`: [rows, vocab], changed in place. The mask is the same for every row."""
        return logits.index_fill_(1, self._ids, -float("inf"))

    def is_argmax_invariant(self) -> bool:
        """A placeholder can be the most likely token."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Nothing to do: no request has a state here."""
