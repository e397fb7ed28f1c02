"""An update inside a vLLM worker: loaded and processed beside the model while that generates, then swapped in.

    staging thread:   add --the model's own load_weights--> shadow layers --vLLM's processing--> finish
    worker's thread:  swap: a copy into the live tensors

The shadow is a second tree of the model's modules. It shares everything with them but parameters and buffers, and those
of a layer are made when its first weight comes. It is never run.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import Attention, MMEncoderAttention, is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import (
    SKIP_TENSORS,
    CopyCounter,
    materialize_meta_tensor,
    to_meta_tensor,
)
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors, get_tensor_load_numel
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from actor.engine_vllm.cpu_reload import CpuReload
from actor.weights.transfer import NamedTensors

# Their processing makes everything anew from the layer's own parameters. That of others (experts, quantized layers,
# latent attention) changes objects that the live layer computes with.
_PLAIN_METHODS = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
_PLAIN_ATTENTION = (Attention, MMEncoderAttention)
_OF_MODULES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


def can_shadow(model: nn.Module) -> bool:
    """Whether every layer can be processed beside the one that generates."""
    return all(
        type(getattr(layer, "quant_method", None)) in _PLAIN_METHODS
        and (not is_deferred_attention_layer(layer) or type(layer) in _PLAIN_ATTENTION)
        for layer in model.modules()
    )


class ReloadedModel:
    """For models that cannot be shadowed: all is kept as it came, and loaded while generation stands still."""

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        self._model: Any = model
        self._config = vllm_config
        self._tensors: list[tuple[str, torch.Tensor]] = []

    def add(self, tensors: NamedTensors) -> None:
        """Keep them, beside the accelerator: each worker gets the whole model, of which it holds a part."""
        self._tensors += [(name, tensor.to("cpu", copy=True)) for name, tensor in tensors]

    def finish(self) -> None:
        """Nothing is left to do."""

    def discard(self) -> None:
        """See `Staging.discard`."""
        self._tensors.clear()

    def swap(self) -> None:
        """Load them. vLLM has packed its parameters; this gives each layer its loadable form back, layer by layer.

        Raises ValueError for a layer of which a tensor has not come: vLLM would leave in it what the memory held.
        """
        on_cpu = CpuReload()
        on_cpu.begin(self._model)
        initialize_layerwise_reload(self._model)
        with torch.no_grad():
            self._model.load_weights(iter(self._tensors))
        for layer in self._model.modules():
            _check_reloaded(layer)
        finalize_layerwise_reload(self._model, self._config.model_config)
        on_cpu.end(self._model)


def _check_reloaded(layer: nn.Module) -> None:
    info = get_layerwise_info(layer)
    came = {name for name, _ in info.loaded_weights}
    if not came or is_deferred_attention_layer(layer):  # vLLM goes back to what was live, or to defaults
        return
    kept = came | info.kernel_non_persistent_buffers
    missing = [name for name, tensor in get_layer_tensors(layer).items() if tensor.is_meta and name not in kept]
    if missing:
        raise ValueError(f"{type(layer).__name__}: nothing has come for {', '.join(sorted(missing))}")


class ShadowModel:
    """The layers of a model for which weights come, once more."""

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, stream: torch.cuda.Stream | None = None) -> None:
        """`stream`: on which it is loaded, on a GPU. torch's allocator keeps the memory of each one apart."""
        self._config = vllm_config
        self._stream = stream
        self._layers: dict[int, _ShadowLayer] = {}  # by the id of the live one
        self._root: Any = self._shadow(model)
        self._swaps: list[Callable[[], object]] = []

    def add(self, tensors: NamedTensors) -> None:
        """Load checkpoint tensors into their layers; process the layers that are complete."""
        with self._loading():
            self._root.load_weights(iter(tensors))

    def finish(self) -> None:
        """Process what is left. Raises ValueError for a layer that cannot be made of what has come."""
        with self._loading():
            loaded = [layer for layer in self._layers.values() if layer.is_loaded]
            shared = {key: tensor for layer in loaded for key, tensor in layer.by_live_parameter()}
            for layer in self._layers.values():
                if not layer.is_loaded:
                    layer.follow(shared)
                self._swaps += layer.finish()
        for layer in self._layers.values():
            layer.forget_loaders()

    def discard(self) -> None:
        """See `Staging.discard`."""
        for layer in self._layers.values():
            layer.forget_loaders()
        self._layers.clear()
        self._swaps.clear()
        self._root = None

    def swap(self) -> None:
        """Make it live."""
        with torch.no_grad():
            for swap in self._swaps:
                swap()
        if self._stream is not None:
            torch.cuda.synchronize(self._stream.device)  # from now on the shadow's memory may be used again

    def _shadow(self, live: nn.Module) -> nn.Module:
        if isinstance(live, BaseLayerWithLoRA):
            live = live.base_layer
        if id(live) not in self._layers:
            self._layers[id(live)] = layer = _ShadowLayer(live)
            layer.shadow._modules = {name: child and self._shadow(child) for name, child in live._modules.items()}  # noqa: SLF001
        shadow: nn.Module = self._layers[id(live)].shadow
        return shadow

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """What vLLM's loaders expect around them."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(set_current_vllm_config(self._config))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.cuda.stream(self._stream))
            if self._stream is not None:
                stack.callback(self._stream.synchronize)
            yield


class _ShadowLayer:
    """One module beside the live one, without its children."""

    def __init__(self, live: nn.Module) -> None:
        self.live = live
        self.shadow = shadow = _copy(live)
        self._num_loaded: collections.Counter[str] = collections.Counter()  # elements, by parameter
        self._blank: set[str] = set()  # parameters of which the live layer has no loadable form
        self._shared: set[str] = set()
        self._is_processed = False
        self._info = get_layerwise_info(live)
        for tensors, loadable in zip((shadow._parameters, shadow._buffers), self._info.restore_metadata, strict=True):  # noqa: SLF001
            kept = {name: tensor for name, tensor in tensors.items() if name in SKIP_TENSORS or tensor is None}
            tensors.clear()
            for name, tensor in {**kept, **loadable}.items():
                tensors[name] = tensor if tensor is None else self._loadable(name, tensor)
        self._attributes = dict(shadow.__dict__)

    @property
    def is_loaded(self) -> bool:
        """Whether anything has come for it."""
        return bool(self._num_loaded)

    def by_live_parameter(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Its parameters in their loadable form, by the id of the live one. Not for those that are packed away."""
        for name, tensor in self.shadow._parameters.items():  # noqa: SLF001 - as below, torch has no other way
            live = self.live._parameters.get(name)  # noqa: SLF001
            if live is not None and tensor is not None and live.shape == tensor.shape:
                yield id(live), tensor

    def follow(self, tensors: dict[int, torch.Tensor]) -> None:
        """Take over the parameters that it shares with other layers, as an output layer tied to the embedding does."""
        for name, live in self.live._parameters.items():  # noqa: SLF001
            if id(live) in tensors and live is not None and live.numel():
                self._materialize()
                self._set(name, tensors[id(live)])
                self._num_loaded[name] += live.numel()
                self._shared.add(name)

    def finish(self) -> list[Callable[[], object]]:
        """Process it, if it is not yet; what makes it live. Raises ValueError if a part of it is missing."""
        if not self.is_loaded:
            return []
        if not self._is_processed:
            self._process()
        swaps: list[Callable[[], object]] = []
        live, shadow = get_layer_tensors(self.live), get_layer_tensors(self.shadow)
        for name, tensor in shadow.items():
            if name in live and live[name].shape == tensor.shape and name not in self._shared:
                swaps.append(functools.partial(live[name].data.copy_, tensor))
            elif name in self.shadow._parameters and name not in self._shared:  # noqa: SLF001
                raise ValueError(f"{type(self.live).__name__}.{name} has another shape once it is processed again")
        swaps += [
            functools.partial(self.live.__dict__.__setitem__, name, value)
            for name, value in self.shadow.__dict__.items()
            if name not in _OF_MODULES and self._attributes.get(name) is not value
        ]
        return swaps

    def forget_loaders(self) -> None:
        """Nothing more is loaded. Loaders refer to their layer, and it to the tensors that have them: memory of a whole
        model would wait for the garbage collector, after each update.
        """
        for tensor in get_layer_tensors(self.shadow).values():
            tensor.__dict__.clear()

    def _loadable(self, name: str, tensor: torch.Tensor) -> Any:
        """A tensor of the meta device that knows how it is loaded into this layer."""
        meta: Any = restore_layer_refs(to_meta_tensor(tensor), self.shadow)
        meta.weight_loader = self._loader(name, getattr(meta, "weight_loader", default_weight_loader))
        return meta

    def _loader(self, name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(self._load, name, load)

    def _load(self, name: str, load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self._materialize()
        real: Any = get_layer_tensors(self.shadow)[name]
        real.weight_loader = load  # loaders look at it
        with CopyCounter() as counter:
            # The model passes the parameter first: maybe that of the meta device still.
            result = load(real, *arguments[1:], **options)
        real.weight_loader = self._loader(name, load)
        self._num_loaded[name] += min(counter.copied_numel, get_tensor_load_numel(real))
        if not self._missing():
            self._process()
        return result

    def _materialize(self) -> None:
        """Real tensors, with what is live in them, so that a part of a layer can be updated."""
        if self.is_loaded:
            return
        live = get_layer_tensors(self.live)
        for name, tensor in get_layer_tensors(self.shadow).items():
            with self._info.restore_device:
                real = materialize_meta_tensor(tensor)
            if name in live and live[name].shape == real.shape:
                real.data.copy_(live[name])
            else:
                self._blank.add(name)
            self._set(name, real)

    def _missing(self) -> set[str]:
        tensors = get_layer_tensors(self.shadow)
        return {name for name in tensors if self._num_loaded[name] < get_tensor_load_numel(tensors[name])}

    def _process(self) -> None:
        if missing := self._missing() & self._blank:
            raise ValueError(
                f"{type(self.live).__name__}: only a part of {', '.join(sorted(missing))} has come, and vLLM has "
                "packed the rest away; send all parameters that it packs together"
            )
        self._is_processed = True
        self.shadow.__dict__.pop("_already_called_process_weights_after_loading", None)
        method = getattr(self.shadow, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(self.shadow)

    def _set(self, name: str, tensor: Any) -> None:
        shadow = self.shadow
        (shadow._parameters if name in shadow._parameters else shadow._buffers)[name] = tensor  # noqa: SLF001


def _copy(live: nn.Module) -> Any:
    """The same module, with dictionaries of its own."""
    shadow = object.__new__(type(live))
    shadow.__dict__ = {**live.__dict__, **{name: live.__dict__[name].copy() for name in _OF_MODULES}}
    return shadow
