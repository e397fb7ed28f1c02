"""Loads the policy: a Hugging Face vision-language checkpoint, ready to train on packed batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import torchvision_ops
from learner.batch.balance import ModelCost
from learner.config.model import Adapter, Part
from learner.model import attention
from learner.model.lora import add_adapter
from learner.model.parts import NAMES, find_modules, text_model
from learner.model.supported import check_supported

# What an image passes before the text model.
_VISION: tuple[Part, ...] = ("vision_tower", "projector")


@dataclass(frozen=True, slots=True)
class FreezeReport:
    """What trains and what does not, in parameters. `frozen` names the frozen modules."""

    num_trainable: int
    num_frozen: int
    frozen: tuple[str, ...] = ()
    num_adapted: int = 0
    """Layers with a LoRA adapter."""


def load_policy(
    model_dir: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    frozen: Sequence[Part] = (),
    adapter: Adapter | None = None,
    gradient_checkpointing: bool = False,
) -> tuple[Any, FreezeReport]:
    """Load a checkpoint directory for training.

    Args:
        model_dir: config and safetensors of a model that `AutoModelForImageTextToText` knows.
        dtype: of the parameters. Rotary frequencies stay float32 in any case.
        frozen: parts whose parameters get no gradient.
        adapter: train this LoRA adapter, in the parts that are not frozen and that it reaches, and nothing else.
        gradient_checkpointing: recompute layers in the backward pass.

    Returns:
        (model in train mode with the packed attention in its text model, what was frozen).

    Raises:
        ValueError: no checkpoint there, a model that cannot be trained, nothing to freeze, or nothing that the adapter
            fits.
    """
    path = Path(model_dir)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no checkpoint: config.json is missing")
    torchvision_ops.install()
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        path,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="sdpa",
    )
    return model, prepare_policy(model, frozen=frozen, adapter=adapter, gradient_checkpointing=gradient_checkpointing)


def prepare_policy(
    model: Any, *, frozen: Sequence[Part] = (), adapter: Adapter | None = None, gradient_checkpointing: bool = False
) -> FreezeReport:
    """Set up a model of transformers, in place, as `load_policy` does."""
    check_supported(model)
    # Only the text model: the vision tower's attention knows its own windows.
    model.config.get_text_config()._attn_implementation = attention.register()  # noqa: SLF001 - no public setter for one
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    _remove_dropout(model)
    num_adapted = 0
    if adapter is not None:
        # Actors apply no adapter to what an image passes, and would get all weights merged at each update.
        left_out = frozen if adapter.reaches_vision else dict.fromkeys((*_VISION, *frozen))
        num_adapted = add_adapter(
            model, adapter, left_out=[name for part in left_out for name in find_modules(model, part)]
        )
    return replace(freeze(model, frozen), num_adapted=num_adapted)


def _remove_dropout(model: nn.Module) -> None:
    """Actors have none: with it, what is trained would not be what was sampled."""
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # of attention, which has no module for it, and stochastic depth
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def model_cost(model: Any) -> ModelCost:
    """What the parts of a whole model cost, by their parameters: a token, or a patch, passes each of them once."""
    towers = [model.get_submodule(name) for name in find_modules(model, "vision_tower")]
    vision = sum(parameter.numel() for tower in towers for parameter in tower.parameters())
    text = sum(parameter.numel() for name, parameter in text_model(model).named_parameters() if "embed" not in name)
    settings = getattr(model.config, "vision_config", None)
    pixel_value = vision / text / patch_elements(settings) if vision and settings is not None else 0.0
    return ModelCost(model.config.get_text_config().hidden_size, pixel_value)


def patch_elements(vision_config: Any) -> int:
    """Elements of `pixel_values` in one patch."""
    size = vision_config.patch_size
    area = size * size if isinstance(size, int) else math.prod(size)
    return int(area * getattr(vision_config, "num_channels", 3) * getattr(vision_config, "temporal_patch_size", 1))


def freeze(model: nn.Module, parts: Sequence[Part]) -> FreezeReport:
    """Take the gradient from parts of a model.

    Raises ValueError if there is no parameter in one of them, or none outside.
    """
    frozen: list[str] = []
    for part in parts:
        modules = find_modules(model, part)
        if not any(True for name in modules for _ in model.get_submodule(name).parameters()):
            raise ValueError(
                f"freeze_{part} found nothing to freeze in {type(model).__name__}: no module is named "
                f"{', '.join(NAMES[part])}; set it to false"
            )
        for name in modules:
            model.get_submodule(name).requires_grad_(False)
        frozen += modules
    num_frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if num_trainable == 0:
        raise ValueError(f"nothing is left to train in {type(model).__name__}: every parameter is frozen")
    return FreezeReport(num_trainable, num_frozen, tuple(frozen))
