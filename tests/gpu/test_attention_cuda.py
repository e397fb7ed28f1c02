"""Flash attention over a pack on a GPU, against the blocks of the CPU in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learner.model.attention import packed_attention, packed_layout
from learner.model.varlen_attention import fits

ROWS, BRANCHES = [9, 5, 3], [0, 0, 0, 0, 1, 1, 2, 2, 2, 0, 0, 0, 1, 2, 0, 0, 1]
TOLERANCE = 2e-2


def _attend(states: list[Tensor], window: int | None) -> tuple[Tensor, list[Tensor]]:
    """(output, gradients of queries, keys and values)."""
    layout = packed_layout(ROWS, torch.tensor(BRANCHES, device=states[0].device))
    leaves: list[Any] = [state.requires_grad_() for state in states]
    batch = (leaf.unsqueeze(0) for leaf in leaves)
    output, _ = packed_attention(
        nn.Identity(), *batch, None, scaling=64**-0.5, sliding_window=window, packed_layout=layout
    )
    output.float().square().sum().backward()
    return output.detach().float().cpu(), [leaf.grad.float().cpu() for leaf in leaves]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pack_is_the_same_by_flash_attention(dtype: torch.dtype, window: int | None) -> None:
    torch.manual_seed(0)
    states = [torch.randn(heads, sum(ROWS), 64).to(dtype) for heads in (4, 2, 2)]
    expected, gradients = _attend([state.float() for state in states], window)
    on_gpu = [state.cuda() for state in states]
    assert fits(on_gpu[0])
    output, others = _attend(on_gpu, window)
    torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=5 * TOLERANCE, atol=5 * TOLERANCE)
