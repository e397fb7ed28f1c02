"""An update beside a live model, with layers that vLLM does not pack: those of the other kinds are in the integration
tests, with a real engine."""

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from actor.engine_vllm.shadow import ReloadedModel, ShadowModel


class Model(nn.Module):
    """Two layers, one of which has a weight loader that is a method of its own, as vLLM's have."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(3, 2)
        self.doubled = Doubled()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.weight.weight_loader = self.weight_loader  # type: ignore[attr-defined]

    def weight_loader(self, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        parameter.data.copy_(2 * loaded)


def test_nothing_is_live_before_the_swap_and_nothing_is_left_behind_it() -> None:
    model = Model()
    record_metadata_for_reloading(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    new = {name: torch.rand_like(parameter) for name, parameter in before.items()}
    with _without_garbage_collection():
        shadow = ShadowModel(model, VllmConfig())
        shadow.add(list(new.items()))
        shadow.finish()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
        shadow.swap()
        left = weakref.ref(shadow)
        layers = [weakref.ref(layer) for layer in shadow._layers.values()]
        del shadow
        assert left() is None
        assert [layer() for layer in layers] == [None] * 3
    for name, parameter in model.named_parameters():
        expected = 2 * new[name] if name.startswith("doubled") else new[name]
        torch.testing.assert_close(parameter, expected, rtol=0, atol=0)
    assert vars(model.doubled.weight) == {"weight_loader": model.doubled.weight_loader}


def test_an_update_that_is_discarded_gives_its_memory_back() -> None:
    """At once, also while an error still refers to it."""
    model = Model()
    record_metadata_for_reloading(model)
    with _without_garbage_collection():
        shadow = ShadowModel(model, VllmConfig())
        shadow.add([("plain.weight", torch.rand(2, 3)), ("doubled.weight", torch.rand(4))])
        half = [layer.shadow.weight for layer in shadow._layers.values() if layer.is_loaded]
        tensors = [weakref.ref(tensor) for tensor in half]
        assert len(tensors) == 2
        del half
        shadow.discard()
        assert [tensor() for tensor in tensors] == [None] * 2


def test_a_reloaded_layer_does_not_go_live_with_tensors_that_nothing_came_for() -> None:
    """vLLM would leave in them what the memory held."""
    model = Model()
    model.plain.register_parameter("scale", nn.Parameter(torch.ones(1)))
    record_metadata_for_reloading(model)
    reloaded = ReloadedModel(model, VllmConfig())
    reloaded.add([("plain.weight", torch.rand(2, 3)), ("doubled.weight", torch.rand(4))])
    reloaded.finish()
    with pytest.raises(ValueError, match="Linear: nothing has come for scale"):
        reloaded.swap()


def test_a_reloaded_layer_keeps_a_part_that_vllm_leaves_in_place() -> None:
    model = Model()
    record_metadata_for_reloading(model)
    bias, weight = model.plain.bias.detach().clone(), torch.rand(2, 3)
    reloaded = ReloadedModel(model, VllmConfig())
    reloaded.add([("plain.weight", weight)])
    reloaded.swap()
    torch.testing.assert_close((model.plain.weight, model.plain.bias), (weight, bias), rtol=0, atol=0)
    torch.testing.assert_close(model.doubled.weight, torch.zeros(4), rtol=0, atol=0)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
