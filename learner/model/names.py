"""A model's parameters as its checkpoint has them: transformers renames and turns some when it loads and when it saves.

Updates go to actors in the form of the checkpoint, for that is what an inference engine knows how to load.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


class CheckpointForm:
    """How to say a model's parameters as `save_pretrained` would; names are those of the model without adapter.

    Example: LLaVA's `model.vision_tower.post_layernorm.bias` is `vision_tower.vision_model.post_layernorm.bias`, and
    the experts of Qwen3-VL-MoE are transposed.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model = model
        self._names: dict[str, str] = {}
        # By name: what turns the parameter back, and the pattern by which it is found.
        self._converters: dict[str, tuple[Any, str]] = {}
        # As `save_pretrained` finds it; None for a model that was not loaded from a checkpoint.
        conversions = getattr(model, "_weight_conversions", None)
        if not conversions:
            return
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        back = [conversion.reverse_transform() for conversion in reversed(conversions)]
        renamings = [one for one in back if isinstance(one, WeightRenaming)]
        converters = [one for one in back if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        for operation in (operation for one in converters for operation in one.operations):
            if getattr(operation, "check_dims", False):
                # On loading it turns what needs it. On saving it would leave all as it is, which engines cannot load.
                operation.check_dims = False
        for name in names:
            self._names[name], pattern = rename_source_key(name, renamings, converters, reverse=True)
            if pattern is not None:
                self._converters[name] = by_pattern[pattern], pattern

    def name(self, name: str) -> str:
        """Of one parameter."""
        return self._names.get(name, name)

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """One whole parameter, as the tensor or tensors of the checkpoint that hold it."""
        new_name = self.name(name)
        if name not in self._converters:
            yield new_name, tensor
            return
        model: Any = self._model
        converter, pattern = self._converters[name]
        converter = copy.deepcopy(converter)  # it collects tensors
        converter.add_tensor(new_name, name, pattern, tensor)
        for saved_name, saved in converter.convert(new_name, model=model, config=model.config).items():
            yield saved_name, saved[0] if isinstance(saved, list) else saved
