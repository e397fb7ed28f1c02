"""`optimizer`: AdamW and its learning rate."""

from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from common.config import Config

_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW and its learning rate."""

    lr: FiniteFloat = Field(1e-6, gt=0)
    """The learning rate, once warm-up is over."""
    weight_decay: FiniteFloat = Field(0.0, ge=0)
    """Of matrices; vectors (norms, biases) do not decay."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    """Decay of the running averages of gradients and of their squares."""
    eps: FiniteFloat = Field(1e-8, gt=0)
    """Added to the denominator of a step."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay, or fall towards `min_lr_ratio * lr`, which the step after the last would have."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear rise; the first has lr / (warmup_steps + 1)."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Share of `lr` that a falling schedule ends at; not with `constant`."""

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> Self:
        if self.min_lr_ratio and self.schedule == "constant":
            raise ValueError("min_lr_ratio needs schedule: linear or cosine")
        return self
