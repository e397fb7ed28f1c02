"""Log-probabilities straight from hidden states: the `[N, V]` logits of a pack never exist at once.

The vocabulary is taken in slices: so each row of the output layer's gradient is written once, where slices of tokens
would add to all of it again and again. With z the logits of a slice s, l_s the log of the sum of exp(z), and H_s the
entropy within it, the whole distribution has

    l = logsumexp(l_s)        H = sum_s w_s (H_s - log w_s)   with w_s = exp(l_s - l), the slice's share

The backward pass computes the logits of each slice again. With p the probability of token v, g and e the gradients of
the target's log-probability and of the entropy,

    gradient of z_v = g (1[v is the target] - p) - e p (log p + H)

Slices are small enough for a CPU's cache and pass over their logits fewer times than autograd would, which makes up for
the matrix product that is done twice.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits that exist at once; a GPU wants larger pieces of work.
_MAX_ELEMENTS_CPU = 2**22
_MAX_ELEMENTS = 2**24

# The logit of an id that could not be sampled. Far below every other but finite: p is exactly 0, and p * log(p) is too.
# And far above the least float32, so that neither sums of its logprob nor their product with a gradient are infinite.
SUPPRESSED_LOGIT = -1e30


def fused_logprobs(
    output_layer: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, suppressed_token_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(logprob of each target `[N]`, entropy of each distribution `[N]`), float32, both with gradient.

    Args:
        output_layer: `nn.Linear` from hidden states `[N, H]` to logits `[N, V]`. Under FSDP2 its parameters are whole.
        hidden: `[N, H]`.
        targets: int64 `[N]`.
        temperature: logits are divided by it.
        suppressed_token_ids: ids with probability 0.
    """
    weight: Any = output_layer.weight
    bias: Any = output_layer.bias
    suppressed = None
    if suppressed_token_ids:
        suppressed = torch.zeros(len(weight), dtype=torch.bool)
        suppressed[torch.tensor(suppressed_token_ids)] = True
        suppressed = suppressed.to(hidden.device)
    results: tuple[Tensor, Tensor] = _FusedLogprobs.apply(hidden, weight, bias, targets, temperature, suppressed)  # type: ignore[no-untyped-call]
    return results


class _FusedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        suppressed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        target_logits = torch.zeros(len(hidden), device=hidden.device)
        normalizers, entropies = [], []
        for part, logits, scratch in _slices(hidden, len(weight)):
            _logits(hidden, weight, bias, temperature, suppressed, part, out=logits)
            inside, columns = _columns(targets, part)
            target_logits = torch.where(inside, logits.gather(1, columns).squeeze(1), target_logits)
            highest = logits.amax(1)
            below = logits.sub_(highest[:, None])
            exponentials = torch.exp(below, out=scratch)
            sums = exponentials.sum(1)
            normalizers.append(highest + sums.log())
            entropies.append(sums.log() - exponentials.mul_(below).sum(1) / sums)
        slice_normalizers = torch.stack(normalizers)
        normalizer = slice_normalizers.logsumexp(0)
        log_shares = slice_normalizers - normalizer
        entropy = (log_shares.exp() * (torch.stack(entropies) - log_shares)).sum(0)
        ctx.save_for_backward(hidden, weight, bias, targets, suppressed, normalizer, entropy)
        ctx.temperature = temperature
        return target_logits - normalizer, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, suppressed, normalizer, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        grad_target = grad_logprobs / ctx.temperature
        slope = -grad_entropy / ctx.temperature
        offset = slope * entropy - grad_target
        for part, logits, scratch in _slices(hidden, len(weight)):
            _logits(hidden, weight, bias, ctx.temperature, suppressed, part, out=logits)
            logprobs = logits.sub_(normalizer[:, None])
            probabilities = torch.exp(logprobs, out=scratch)
            # p (slope * log p + offset), in place of the logits.
            grad = torch.addcmul(offset[:, None], logprobs, slope[:, None], out=logprobs).mul_(probabilities)
            inside, columns = _columns(targets, part)
            grad.scatter_add_(1, columns, torch.where(inside, grad_target, 0.0)[:, None])
            if suppressed is not None:
                grad.masked_fill_(suppressed[part], 0.0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                _add_product(grad_hidden, grad, weight[part])
            if grad_weight is not None:
                torch.mm(grad.T, hidden, out=grad_weight[part])
            if grad_bias is not None:
                grad_bias[part] = grad.sum(0)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None


def _slices(hidden: Tensor, vocab_size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each slice of the vocabulary with two float32 `[N, slice]` to work in, the same memory for all slices.

    (An allocator that is asked for each slice anew keeps several times as much.)
    """
    elements = _MAX_ELEMENTS_CPU if hidden.device.type == "cpu" else _MAX_ELEMENTS
    num_rows = len(hidden)
    width = min(vocab_size, max(1, elements // max(1, num_rows)))
    memory = torch.empty(2, num_rows * width, device=hidden.device)
    for start in range(0, vocab_size, width):
        stop = min(start + width, vocab_size)
        logits, scratch = memory[:, : num_rows * (stop - start)].view(2, num_rows, stop - start)
        yield slice(start, stop), logits, scratch


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    suppressed: Tensor | None,
    part: slice,
    *,
    out: Tensor,
) -> None:
    """Write the logits of a slice into `out`."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight[part].T, out=out)
    else:
        out.copy_(hidden @ weight[part].T)
    if bias is not None:
        out += bias[part]
    if temperature != 1.0:
        out /= temperature
    if suppressed is not None:
        out.masked_fill_(suppressed[part], SUPPRESSED_LOGIT)


def _columns(targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """(bool `[N]`: the target is in this slice; int64 `[N, 1]`: its column there, any column if it is not)."""
    inside = (targets >= part.start) & (targets < part.stop)
    return inside, (targets - part.start).clamp(0, part.stop - part.start - 1)[:, None]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with the sum over slices in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
