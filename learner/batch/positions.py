"""Positions of a prompt, by the model's own code.

Vision-language models of the Qwen family give image tokens three-dimensional positions (M-RoPE: temporal, height,
width), and text after an image goes on from their maximum. The rule belongs to the model class and needs none of its
weights, so it is asked of a model on the meta device. Positions are made per prompt, before packing.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class PositionIndexer:
    """Computes `position_ids` for one expanded prompt of the model that `config` describes.

    Imports the model's class, and torchvision with it: call `common.torchvision_ops.install` before.
    """

    def __init__(self, config: "PretrainedConfig") -> None:
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(_without_layers(config))
        self._get_rope_index = getattr(model.model, "get_rope_index", None)
        parameters = inspect.signature(self._get_rope_index).parameters if self._get_rope_index else {}
        self._arguments = frozenset(parameters)

    def __call__(self, input_ids: Tensor, processor_output: Mapping[str, Any]) -> tuple[Tensor, int]:
        """Positions of one prompt.

        Args:
            input_ids: `[P]`, expanded.
            processor_output: what the processor returned beside the ids; the entries that the model's
                `get_rope_index` takes by name are used (`mm_token_type_ids`, `image_grid_thw`, ...).

        Returns:
            (`position_ids` int64 `[3, P]`, or `[1, P]` for a model without M-RoPE; position of the next token).
        """
        if self._get_rope_index is None:
            return torch.arange(len(input_ids)).unsqueeze(0), len(input_ids)
        known = {name: value for name, value in processor_output.items() if name in self._arguments}
        known.pop("input_ids", None)
        known.pop("attention_mask", None)
        position_ids, _ = self._get_rope_index(input_ids.long().unsqueeze(0), **known)
        positions: Tensor = position_ids[:, 0].long()
        return positions, int(positions.max()) + 1


def _without_layers(config: "PretrainedConfig") -> "PretrainedConfig":
    """The config with one decoder layer: positions do not depend on the rest, and building it takes time."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    return small
