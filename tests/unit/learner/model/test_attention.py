import math

import pytest
import torch
from torch import Tensor, nn

from learner.model.attention import packed_attention, packed_layout


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: list[int],
    branches: list[int],
    images: list[int] | None = None,
    window: int | None = None,
) -> Tensor:
    """Token by token: same row, not later, branch 0 or the own one. `[heads, T, d]` in, `[T, heads, d]` out.

    Tokens of one image (not 0) see each other; of what is in front, `window` tokens are seen, the query's own included.
    """
    images = images or [0] * len(rows)
    # The tokens of each token's own sequence up to itself.
    before = [
        [s for s in range(t + 1) if rows[s] == rows[t] and branches[s] in {0, branches[t]}] for t in range(len(rows))
    ]
    heads, num_tokens, dim = query.shape
    group = heads // key.shape[0]
    outputs = []
    for t in range(num_tokens):
        visible = before[t] if window is None else before[t][-window:]
        visible = visible + [s for s in range(t + 1, num_tokens) if images[t] and images[s] == images[t]]
        for h in range(heads):
            scores = torch.stack([query[h, t] @ key[h // group, s] / math.sqrt(dim) for s in visible])
            weights = scores.softmax(0)
            outputs.append(weights @ value[h // group, visible])
    return torch.stack(outputs).view(num_tokens, heads, dim)


def naive_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_queries: int,
    max_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """What torch says of its varlen_attn, for the windows (left, 0): causal, and the last query sees all keys."""
    assert (query_offsets.dtype, key_offsets.dtype) == (torch.int32, torch.int32)
    lengths = query_offsets.diff().tolist(), key_offsets.diff().tolist()
    assert (max(lengths[0]), max(lengths[1])) == (max_queries, max_keys)
    assert query.shape[1:] == key.shape[1:] == value.shape[1:]
    left, right = window_size
    assert right == 0
    outputs = []
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        place, other = torch.arange(len(q))[:, None] + len(k) - len(q), torch.arange(len(k))
        visible = (other <= place) & ((other >= place - left) | (left == -1))
        scores = torch.einsum("qhd,khd->hqk", q, k).mul(scale).masked_fill(~visible, -math.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


@pytest.fixture(params=["blocks", "varlen"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute a pack; that of GPUs with a stand-in for the kernel."""
    if request.param == "varlen":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", naive_varlen)
        monkeypatch.setattr("learner.model.attention.fits", lambda _query: True)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("row_lengths", "branches"),
    [
        ([4, 4], [0, 0, 1, 2, 0, 1, 1, 2]),  # equal rows: no gather
        ([1, 7, 3, 2], [0, 0, 0, 1, 1, 2, 2, 3, 0, 0, 1, 0, 0]),  # several blocks, out of order
        ([5, 4], [0, 0, 1, 1, 2, 0, 1, 2, 2]),  # one block with padding
        ([3], [0, 1, 2]),
        ([3, 3], [0, 1, 1, 0, 0, 1]),  # no mask, no gather
        ([2, 5, 4, 5], [0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 2, 2]),  # three rows without a mask, padded; one with
    ],
)
def test_values_and_gradients_are_those_of_a_naive_loop(row_lengths: list[int], branches: list[int]) -> None:
    torch.manual_seed(0)
    rows = [row for row, length in enumerate(row_lengths) for _ in range(length)]
    states = [torch.randn(heads, len(rows), 8, requires_grad=True) for heads in (4, 2, 2)]
    copies = [state.detach().clone().requires_grad_() for state in states]
    layout = packed_layout(row_lengths, torch.tensor(branches))
    query, key, value = (state.unsqueeze(0) for state in states)
    output, _ = packed_attention(nn.Identity(), query, key, value, None, scaling=8**-0.5, packed_layout=layout)
    expected = naive_attention(copies[0], copies[1], copies[2], rows, branches)
    torch.testing.assert_close(output[0], expected, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(expected)
    (output[0] * weight).sum().backward()
    (expected * weight).sum().backward()
    for state, copy in zip(states, copies, strict=True):
        torch.testing.assert_close(state.grad, copy.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("window", [1, 2, 4])
def test_windows_are_those_of_a_naive_loop(window: int) -> None:
    torch.manual_seed(0)
    row_lengths, branches = [9, 5, 3], [0, 0, 0, 0, 1, 1, 2, 2, 2, 0, 0, 0, 1, 2, 0, 0, 1]
    rows = [row for row, length in enumerate(row_lengths) for _ in range(length)]
    query, key, value = (torch.randn(heads, len(rows), 8) for heads in (4, 2, 2))
    states = (state.unsqueeze(0) for state in (query, key, value))
    layout = packed_layout(row_lengths, torch.tensor(branches))
    output, _ = packed_attention(
        nn.Identity(), *states, None, scaling=8**-0.5, sliding_window=window, packed_layout=layout
    )
    expected = naive_attention(query, key, value, rows, branches, window=window)
    torch.testing.assert_close(output[0], expected, atol=1e-6, rtol=1e-5)


def test_keys_of_flash_attention_by_hand() -> None:
    varlen = packed_layout([8, 3], torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 0, 1, 1])).varlen
    assert varlen is not None
    assert varlen.gather is not None
    assert varlen.query_offsets.tolist() == [0, 3, 5, 8, 11]
    assert varlen.key_offsets.tolist() == [0, 3, 8, 14, 17]
    assert varlen.gather.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10]
    assert (varlen.max_queries, varlen.max_keys) == (3, 6)
    alone = packed_layout([2, 3], torch.tensor([0, 1, 0, 1, 1])).varlen
    assert alone is not None
    assert alone.gather is None


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("window", [None, 2, 4])
def test_windows_and_images_are_those_of_a_naive_loop(window: int | None) -> None:
    torch.manual_seed(0)
    row_lengths, branches = [9, 5, 3], [0, 0, 0, 0, 1, 1, 2, 2, 2, 0, 0, 0, 1, 2, 0, 0, 1]
    images = [0, 1, 1, 0, 0, 0, 0, 0, 0, 2, 2, 2, 0, 0, 3, 3, 0]
    rows = [row for row, length in enumerate(row_lengths) for _ in range(length)]
    query, key, value = (torch.randn(heads, len(rows), 8) for heads in (4, 2, 2))
    layout = packed_layout(row_lengths, torch.tensor(branches), torch.tensor(images) > 0)
    states = (state.unsqueeze(0) for state in (query, key, value))
    output, _ = packed_attention(
        nn.Identity(), *states, None, scaling=8**-0.5, sliding_window=window, packed_layout=layout
    )
    expected = naive_attention(query, key, value, rows, branches, images, window)
    torch.testing.assert_close(output[0], expected, atol=1e-6, rtol=1e-5)


def test_attention_that_is_not_understood_is_refused() -> None:
    states = torch.zeros(1, 2, 3, 4)
    layout = packed_layout([3], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="has softcap"):
        packed_attention(nn.Identity(), states, states, states, None, packed_layout=layout, softcap=30.0)


def test_rows_share_a_block_while_padding_costs_less_than_a_call() -> None:
    row_lengths = [200, 30, 190, 130, 20]
    layout = packed_layout(row_lengths, torch.zeros(570, dtype=torch.int64))
    # 200^2 - 190^2 = 3900 pairs, 200^2 - 130^2 = 23100 more than 2^14; 130^2 - 30^2 = 16000, with 20^2 more than 2^14.
    assert [(block.num_rows, block.length) for block in layout.blocks] == [(2, 200), (2, 130), (1, 20)]


def test_only_rows_of_one_completion_need_no_mask() -> None:
    layout = packed_layout([3, 4, 3], torch.tensor([0, 1, 1, 0, 1, 2, 2, 0, 0, 0]))
    assert [(block.num_rows, block.length, block.causal) for block in layout.blocks] == [(1, 4, False), (2, 3, True)]
    branched, plain = layout.blocks
    assert branched.mask(None) is not None
    assert plain.mask(None) is plain.mask(3) is None
    window = plain.mask(2)
    assert window is not None
    assert window[0, 0].tolist() == [[True, False, False], [True, True, False], [False, True, True]]
    seen_whole = packed_layout([3], torch.zeros(3, dtype=torch.int64), torch.tensor([False, True, True]))
    assert not seen_whole.blocks[0].causal


def test_rows_must_fill_the_pack() -> None:
    with pytest.raises(ValueError, match="rows hold 5 tokens, the pack 6"):
        packed_layout([2, 3], torch.zeros(6, dtype=torch.int64))
