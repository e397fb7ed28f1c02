"""What the `adapter_config.json` of an adapter may say: which layers have B A, of which rank, and the scaling.

PEFT has many more settings, and drops with a warning those that it does not know yet. Whatever is set beside the ones
here is refused by name: learner, actors and exported checkpoints would each compute something else.
"""

import json
from pathlib import Path
from typing import Any

_FILE = "adapter_config.json"
# Go on as they are. The scaling travels to actors within B, so that they need none of these.
_KEPT = frozenset(
    (
        *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("base_model_name_or_path", "task_type"),
    )
)
# How the adapter came about, or of use with a setting that is refused. Dropout is none: actors have none either, and
# what is trained would not be what was sampled.
_FORGOTTEN = frozenset(
    (
        *("auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config", "lora_dropout"),
        *("eva_config", "megatron_core", "qalora_group_size"),
    )
)
# Other values change the weights below the adapter, or add to it.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


def read_settings(directory: Path) -> dict[str, Any]:
    """Arguments of PEFT's `LoraConfig`. Raises ValueError for what is no plain LoRA adapter."""
    file = directory / _FILE
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} holds no adapter: {_FILE} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{directory} holds no adapter: {_FILE} is no mapping")
    odd = [f"{name}: {json.dumps(value):.60}" for name, value in values.items() if not _is_plain(name, value)]
    if odd:
        raise ValueError(f"{directory} is not a plain LoRA adapter: it has {', '.join(odd)}")
    return {name: value for name, value in values.items() if name in _KEPT}


def _is_plain(name: str, value: object) -> bool:
    if name in _ALLOWED:
        return value in _ALLOWED[name]
    return name in _KEPT or name in _FORGOTTEN or not value
