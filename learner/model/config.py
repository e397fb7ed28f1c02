"""Settings of the optimizer and of the adapter. Imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import pydantic

from common.config import Config

Part = Literal["vision_tower", "projector", "language_model"]
"""Of a model, as far as it can be frozen."""

_Beta = Annotated[float, pydantic.Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW and its learning rate."""

    lr: pydantic.FiniteFloat = pydantic.Field(default=1e-6, gt=0)
    """After warm-up."""
    weight_decay: pydantic.FiniteFloat = pydantic.Field(default=0.0, ge=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    eps: pydantic.FiniteFloat = pydantic.Field(default=1e-8, gt=0)
    max_grad_norm: float = pydantic.Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay, or fall towards `min_lr_ratio * lr`, which the step after the last would have."""
    warmup_steps: int = pydantic.Field(default=0, ge=0)
    """Steps of linear rise; the first has lr / (warmup_steps + 1)."""
    min_lr_ratio: float = pydantic.Field(default=0.0, ge=0, le=1)

    @pydantic.model_validator(mode="after")
    def _no_setting_without_effect(self) -> Self:
        if self.min_lr_ratio and self.schedule == "constant":
            raise ValueError("min_lr_ratio needs schedule: linear or cosine")
        return self


@dataclass(frozen=True, slots=True)
class Adapter:
    """Where the adapter goes, and how large it is. Names and meaning are those of PEFT's `LoraConfig`."""

    rank: int = 8
    alpha: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear`: every linear layer of the text model but the output layer. Ends of names of the text model's
    modules. Or one regular expression, matched against the whole names of all modules, the vision tower's too."""
    exclude_modules: tuple[str, ...] = ()
    """Ends of module names."""
    path: Path | None = None
    """Begin with this adapter, a directory as PEFT writes it; everything else here is then read from it."""

    @property
    def reaches_vision(self) -> bool:
        """Whether layers that an image passes before the text model may have the adapter: with a regular expression."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of a step, counted from 0; a pure function, so that resuming needs no scheduler state."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    falling = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * falling)
