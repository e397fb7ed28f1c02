"""`model`: the policy, and what of it trains. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from common.config import Config

Part = Literal["vision_tower", "projector", "language_model"]
"""Of a model, as far as it can be frozen."""


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


class ModelConfig(Config):
    """The policy. Names as users of verl know them."""

    path: Path
    """Checkpoint directory in Hugging Face format; the actors load the same one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters. AdamW has no other copy of them: what trains in full is float32."""
    compute_bfloat16: bool = False
    """Parameters of dtype float32 are gathered and multiplied in bfloat16 (mixed precision)."""
    freeze_vision_tower: bool = False
    """The vision tower does not train. A run where these three freeze nothing, or everything, is refused."""
    freeze_projector: bool = False
    """What leads from the vision tower to the text model does not train."""
    freeze_language_model: bool = False
    """The text model does not train."""
    enable_gradient_checkpointing: bool = False
    """Activations are computed again in the backward pass, layer by layer, and not kept: less memory, more time."""
    use_fused_kernels: bool = False
    """Logprobs straight from hidden states: logits of all tokens never exist at once."""
    cpu_offload: bool = False
    """Parameters, gradients and the optimizer live in CPU memory; the GPU holds one layer at a time."""
    use_torch_compile: bool = False
    """Layers go through torch.compile: faster on GPUs, after a minute or more in the first steps."""
    lora_rank: int = Field(0, ge=0)
    """LoRA: train an adapter of this rank and nothing else. 0: off."""
    lora_alpha: int = Field(16, gt=0)
    """What the adapter adds is scaled by lora_alpha / lora_rank."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Where the adapter goes: "all-linear" or ends of module names, in the text model, never in the vision tower or the
    projector. Or one regular expression for whole names: what it matches in the vision tower and the projector has an
    adapter too."""
    exclude_modules: tuple[str, ...] = ()
    """Ends of the names of modules that have no adapter."""
    lora_adapter_path: Path | None = None
    """Go on with this adapter, a directory that PEFT wrote; rank, alpha and modules are then its own. More than plain
    LoRA (DoRA, aLoRA, modules_to_save and so on) is refused by name."""

    @property
    def frozen(self) -> tuple[Part, ...]:
        """The parts that do not train."""
        return tuple(part for part in get_args(Part) if getattr(self, f"freeze_{part}"))

    @property
    def adapter(self) -> Adapter | None:
        """The LoRA adapter that trains."""
        if not self.lora_rank and self.lora_adapter_path is None:
            return None
        return Adapter(
            self.lora_rank, self.lora_alpha, self.target_modules, self.exclude_modules, self.lora_adapter_path
        )

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> Self:
        for name in ("exclude_modules", "lora_alpha", "target_modules"):
            if not self.lora_rank and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} needs lora_rank")
        if self.lora_rank and self.lora_adapter_path is not None:
            raise ValueError("lora_adapter_path brings its own lora_rank; set one of them")
        return self
