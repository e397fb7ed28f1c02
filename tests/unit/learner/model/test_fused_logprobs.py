"""Fused logprobs against autograd in float64 on the whole logits."""

from collections.abc import Callable, Sequence

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


def plain_logprobs(
    layer: nn.Linear, hidden: Tensor, targets: Tensor, temperature: float, suppressed: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The other way to the same: from whole logits."""
    return token_logprobs(layer(hidden), targets, temperature, suppressed)


@pytest.mark.parametrize("compute", [plain_logprobs, fused_logprobs])
@pytest.mark.parametrize("allowed", [[8, 22], [8, 11, 22], list(range(8, V))])
def test_ids_that_cannot_be_sampled_count_nothing_though_their_logits_are_highest(
    monkeypatch: pytest.MonkeyPatch, compute: Callable[..., tuple[Tensor, Tensor]], allowed: list[int]
) -> None:
    """Minus infinity would make 0 * inf, no number, of their share in the entropy and in its gradient."""
    monkeypatch.setattr(module, "_MAX_ELEMENTS_CPU", 4 * N)
    suppressed = tuple(set(range(V)) - set(allowed))
    results = []
    for dtype in (torch.float32, torch.float64):
        layer, hidden, _ = inputs(bias=True)
        with torch.no_grad():
            layer.bias[list(suppressed)] += 80.0
        targets = torch.tensor([allowed[i % len(allowed)] for i in range(N)])
        layer, hidden = layer.to(dtype), hidden.detach().to(dtype).requires_grad_()
        if dtype == torch.float64:
            values = naive(layer, hidden, targets, 0.7, suppressed)
        else:
            values = torch.stack(compute(layer, hidden, targets, 0.7, suppressed), 1)
        (values * torch.linspace(-3, 3, 2 * N).view(N, 2)).sum().backward()
        results.append((values.double(), hidden.grad, *(parameter.grad for parameter in layer.parameters())))
    for mine, expected in zip(*results, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compute", [plain_logprobs, fused_logprobs])
def test_a_target_that_cannot_be_sampled_is_very_unlikely_and_no_nan(
    compute: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    layer, hidden, _ = inputs(bias=True)
    logprobs, entropy = compute(layer, hidden, torch.arange(N), 1.0, (0, 1, 2))
    assert (logprobs < -1e20).tolist() == [True] * 3 + [False] * (N - 3)
    of_one_completion = torch.zeros(N, dtype=torch.int64)
    log_ratios = torch.zeros(1).index_add(0, of_one_completion, logprobs)  # as GSPO has it
    (log_ratios.clamp(min=-20.0).sum() + entropy.sum()).backward()
    for value in (log_ratios, entropy, hidden.grad, layer.weight.grad):
        assert value is not None
        assert bool(value.isfinite().all())


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
