"""LoRA through PEFT: adapters inside the model's own linear layers.

    h = W x + scaling * B (A x)        arXiv 2106.09685, section 4.1; scaling = lora_alpha / lora_rank

W is frozen, A and B train. Nothing outside this module knows: module names stay the model's own, actors and exported
checkpoints get W + scaling * B A under the name of W, and without the adapter the model is the one that training began
with.

Imports PEFT, and with it transformers, only when used (see `learner.model.attention`).
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learner.config.model import Adapter
from learner.model.adapter_settings import read_settings

_NAME = "default"
_BASE = ".base_layer."
_WEIGHTS_FILE = "adapter_model.safetensors"
# What PEFT puts before the names of the model's own modules in its files.
FILE_PREFIX = "base_model.model."


def add_adapter(model: Any, adapter: Adapter, *, left_out: Sequence[str] = ()) -> int:
    """Put the adapter into a model of transformers, in place, and freeze everything else.

    A fresh adapter changes nothing (B = 0); A comes from torch's generator, so equal seeds give equal ranks.

    Args:
        model: not sharded yet.
        adapter: what to add.
        left_out: modules without adapter; not with `adapter.path`, which says itself where it is.

    Returns:
        The number of adapted layers.

    Raises:
        ValueError: no module fits, one is no linear layer of its own, or the directory holds no adapter for this model.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    excluded = [rf"(?:.*\.)?{re.escape(name)}" for name in adapter.exclude_modules]
    excluded += [rf"{re.escape(name)}(?:\..*)?" for name in left_out]
    if adapter.path is not None:
        where = str(adapter.path)
        config = LoraConfig(**read_settings(adapter.path))
    else:
        targets: Any = adapter.target_modules
        where = f"target_modules {targets}" + (f" outside {', '.join(left_out)}" if left_out else "")
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            exclude_modules="|".join(excluded) or None,
        )
    try:
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    except ValueError as error:
        raise ValueError(f"no layer for {where}: {error}") from error
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in adapted.items():
        _require_linear(name, module.get_base_layer(), model.get_input_embeddings())
    if adapter.path is not None:
        _load(model, adapter.path / _WEIGHTS_FILE)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small updates are lost in bfloat16
    return len(adapted)


def _require_linear(name: str, layer: nn.Module, embeddings: nn.Module) -> None:
    """Of the other kinds of layer that PEFT adapts, B A is no change of the weight that can be merged and sent."""
    advice = "add it to model.exclude_modules, or leave it out of model.target_modules"
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} is a {type(layer).__name__}, and an adapter goes into linear layers; {advice}")
    if layer.weight is embeddings.weight:
        raise ValueError(f"{name} has the weight of the embeddings, which an adapter would leave behind; {advice}")


def own_name(name: str) -> str | None:
    """The name of a parameter or buffer in the model without adapter; None for what belongs to the adapter."""
    if ".lora_" in name:
        return None
    return name.replace(_BASE, ".")


def adapted_weight(model: nn.Module, name: str) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, scaling) if `name` is a weight with an adapter."""
    layer_name, base, rest = name.rpartition(_BASE)
    if not base or rest != "weight":
        return None
    layer: Any = model.get_submodule(layer_name)
    return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight, layer.scaling[_NAME]


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, float]]:
    """The matrices by their names in PEFT's files, each with its factor: the scaling for B, 1 for A. Maybe none."""
    for name, parameter in model.named_parameters():
        layer_name, found, _ = name.rpartition(".lora_")
        if found:
            layer: Any = model.get_submodule(layer_name)
            factor = layer.scaling[_NAME] if ".lora_B." in name else 1.0
            yield FILE_PREFIX + name.replace(f".{_NAME}.", "."), parameter, factor


def merge(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling * B A, computed in float32, in the dtype of W."""
    return (weight.float() + scaling * (b.float() @ a.float())).to(weight.dtype)


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole state dict of `model` as that of a model without adapter."""
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = own_name(name)
        if own is None:
            continue
        merged[own] = tensor
        if (adapted := adapted_weight(model, name)) is not None:
            layer_name = name.rpartition(_BASE)[0]
            a, b = (state[f"{layer_name}.lora_{which}.{_NAME}.weight"] for which in "AB")
            merged[own] = merge(tensor, a, b, adapted[2])
    return merged


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The model that training began with, for a forward without gradient.

    By the scale: PEFT's own way also switches `requires_grad`, under the feet of FSDP2.
    """
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.set_scale(_NAME, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(_NAME, 1.0)


def save_adapter(model: Any, state: Mapping[str, Tensor], base: Path, directory: Path) -> None:
    """Write the adapter as PEFT does, from a whole state dict of `model`. `base` is the model that it belongs to."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    config = model.peft_config[_NAME]
    config.base_model_name_or_path = str(base)
    config.inference_mode = True
    config.save_pretrained(str(directory))
    weights = {
        FILE_PREFIX + name.replace(f".{_NAME}.", "."): tensor.contiguous()
        for name, tensor in state.items()
        if ".lora_" in name
    }
    save_file(weights, directory / _WEIGHTS_FILE, metadata={"format": "pt"})


def _load(model: nn.Module, file: Path) -> None:
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    own = {FILE_PREFIX + name.replace(f".{_NAME}.", "."): parameters[name] for name in parameters if ".lora_" in name}
    weights = load_file(file)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise ValueError(f"{file} is not an adapter of this {type(model).__name__}: {odd[0]} is in one of them only")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(
                    f"{file}: {name} has shape {list(weights[name].shape)}, the model wants {list(parameter.shape)}"
                )
            parameter.copy_(weights[name])
