"""Fused logprobs against autograd in float64 on the whole logits."""

import pytest
import torch
from torch import Tensor, nn

from learner.model import fused_logprobs as module
from learner.model.fused_logprobs import fused_logprobs
from learner.model.logprobs import token_logprobs

N, H, V = 7, 5, 23


def naive(layer: nn.Linear, hidden: Tensor, targets: Tensor, temperature: float, suppressed: tuple[int, ...]) -> Tensor:
    """Rows of (logprob, entropy), from the definition."""
    allowed = [v for v in range(V) if v not in suppressed]
    logits = layer(hidden)[:, allowed] / temperature
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    columns = torch.tensor([allowed.index(target) for target in targets.tolist()])
    return torch.stack([p[torch.arange(len(p)), columns].log(), -(p * p.log()).sum(1)], 1)


def inputs(bias: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(H, V, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(4.0)
    targets = torch.randint(8, V, (N,))
    targets[0], targets[1] = V - 1, 8
    return layer, torch.randn(N, H, requires_grad=True), targets


# The first with a slice in which every id is suppressed.
@pytest.mark.parametrize("suppressed", [(0, 1, 2, 3, 4, 5, 7), (5, 7), ()])
@pytest.mark.parametrize("width", [1, 3, V, 100])
@pytest.mark.parametrize(("temperature", "bias"), [(1.0, False), (0.7, True)])
def test_values_and_gradients_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, suppressed: tuple[int, ...], width: int, temperature: float, bias: bool
) -> None:
    monkeypatch.setattr(module, "_MAX_ELEMENTS_CPU", width * N)
    layer, hidden, targets = inputs(bias)
    logprobs, entropy = fused_logprobs(layer, hidden, targets, temperature, suppressed)
    weights = torch.linspace(-3, 3, 2 * N).view(N, 2)
    values = torch.stack([logprobs, entropy], 1)
    (values * weights).sum().backward()

    exact, exact_hidden, _ = inputs(bias)
    exact = exact.double()
    double_hidden = exact_hidden.detach().double().requires_grad_()
    expected = naive(exact, double_hidden, targets, temperature, suppressed)
    (expected * weights).sum().backward()

    assert expected[:, 1].std() > 0.1  # entropies differ
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=1e-5)
    assert hidden.grad is not None
    assert double_hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), double_hidden.grad, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_a_steep_gradient_of_the_entropy_meets_no_infinity(fused: bool, temperature: float) -> None:
    layer, hidden, targets = torch.nn.Linear(3, 6), torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 3])
    if fused:
        _, entropy = fused_logprobs(layer, hidden, targets, temperature, (4, 5))
    else:
        _, entropy = token_logprobs(layer(hidden), targets, temperature, (4, 5))
    (1e4 * entropy).sum().backward()
    assert layer.weight.grad is not None
    assert torch.isfinite(layer.weight.grad).all()
    assert torch.isfinite(entropy).all()
    assert not layer.weight.grad[4:].any()


def test_what_is_frozen_gets_no_gradient() -> None:
    layer, hidden, targets = inputs(bias=True)
    layer.requires_grad_(False)
    fused_logprobs(layer, hidden, targets, 1.0, ())[0].sum().backward()
    assert layer.weight.grad is None
    assert hidden.grad is not None
    layer.requires_grad_(True)
    fused_logprobs(layer, hidden.detach(), targets, 1.0, ())[0].sum().backward()
    assert layer.weight.grad is not None


def test_a_pack_without_targets_has_gradients_of_zero() -> None:
    layer, hidden, targets = inputs(bias=False)
    logprobs, entropy = fused_logprobs(layer, hidden[:0], targets[:0], 1.0, (3,))
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() == 0


def test_logits_that_are_not_numbers_reach_both_values() -> None:
    layer, hidden, targets = inputs(bias=False)
    with torch.no_grad():
        layer.weight[2, 0] = torch.nan
    logprobs, entropy = fused_logprobs(layer, hidden, targets, 1.0, ())
    assert logprobs.isnan().all()
    assert entropy.isnan().all()


def test_bfloat16_rounds_logits_and_gradients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_ELEMENTS_CPU", 4 * N)
    layer, hidden, targets = inputs(bias=False)
    layer, half = layer.bfloat16(), hidden.detach().bfloat16().requires_grad_()
    logprobs, entropy = fused_logprobs(layer, half, targets, 1.0, ())
    (logprobs.sum() + entropy.sum()).backward()
    copy = half.detach().clone().requires_grad_()
    rounded = torch.log_softmax(layer(copy).float(), -1)
    torch.testing.assert_close(logprobs, rounded.gather(1, targets[:, None]).squeeze(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(rounded.exp() * rounded).sum(1), atol=1e-5, rtol=1e-5)
    grad, weight_grad = half.grad, layer.weight.grad
    layer.weight.grad = None
    (rounded.gather(1, targets[:, None]).sum() - (rounded.exp() * rounded).sum()).backward()
    torch.testing.assert_close((grad, weight_grad), (copy.grad, layer.weight.grad), atol=0.05, rtol=0.02)
