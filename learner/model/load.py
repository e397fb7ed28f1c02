"""Loads the policy: a Hugging Face vision-language checkpoint, ready to train on packed batches."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import torchvision_ops
from learner.model import attention

# Where the vision tower is, by the names that models of transformers give it.
_VISION_MODULES = ("visual", "vision_tower", "vision_model", "vision_encoder")


@dataclass(frozen=True, slots=True)
class FreezeReport:
    """What trains and what does not, in parameters. `frozen` names the frozen modules."""

    num_trainable: int
    num_frozen: int
    frozen: tuple[str, ...] = ()


def load_policy(
    model_dir: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    freeze_vision_tower: bool = False,
    gradient_checkpointing: bool = False,
) -> tuple[Any, FreezeReport]:
    """Load a checkpoint directory for training.

    Args:
        model_dir: config and safetensors of a model that `AutoModelForImageTextToText` knows.
        dtype: of the parameters. Rotary frequencies stay float32 in any case.
        freeze_vision_tower: its parameters get no gradient.
        gradient_checkpointing: recompute layers in the backward pass.

    Returns:
        (model in train mode with the packed attention in its text model, what was frozen).

    Raises:
        ValueError: no checkpoint there, or no vision tower to freeze.
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
    return model, prepare_policy(
        model, freeze_vision_tower=freeze_vision_tower, gradient_checkpointing=gradient_checkpointing
    )


def prepare_policy(
    model: Any, *, freeze_vision_tower: bool = False, gradient_checkpointing: bool = False
) -> FreezeReport:
    """Set up a model of transformers, in place, as `load_policy` does."""
    # Only the text model: the vision tower's attention knows its own windows.
    model.config.get_text_config()._attn_implementation = attention.register()  # noqa: SLF001 - no public setter for one
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return freeze(model, vision_modules(model) if freeze_vision_tower else None)


def vision_modules(model: nn.Module) -> list[str]:
    """Full names of the vision towers of a model."""
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in _VISION_MODULES]


def freeze(model: nn.Module, modules: Iterable[str] | None) -> FreezeReport:
    """Take the gradient from the named modules; `None` freezes nothing.

    Raises ValueError if modules were to be frozen and there is no parameter in them.
    """
    frozen = tuple(modules) if modules is not None else ()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    num_frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if modules is not None and num_frozen == 0:
        raise ValueError(
            f"freeze_vision_tower found nothing to freeze in {type(model).__name__}: no module is named "
            f"{', '.join(_VISION_MODULES)}; set it to false"
        )
    if num_trainable == 0:
        raise ValueError(f"nothing is left to train in {type(model).__name__}: every parameter is frozen")
    return FreezeReport(num_trainable, num_frozen, frozen)
