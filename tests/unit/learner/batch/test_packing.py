import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.types import Completion, FinishReason, PromptInfo, VersionSpan
from learner.batch.balance import ModelCost, balance
from learner.batch.pack_bytes import decode_packs, encode_packs
from learner.batch.packing import PackedBatch, Row, pack, pack_batch
from learner.types import Group, ProcessedPrompt, PromptSample


def prompt(
    ids: list[int], media: dict[str, torch.Tensor] | None = None, next_position: int | None = None
) -> ProcessedPrompt:
    positions = np.tile(np.arange(len(ids), dtype=np.int64), (3, 1))
    return ProcessedPrompt(np.array(ids, np.int32), positions, next_position or len(ids), media or {}, (), ())


def completion(ids: list[int], spans: tuple[VersionSpan, ...] | None = None) -> Completion:
    logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
    spans = spans if spans is not None else (VersionSpan(3, 0, len(ids)),)
    return Completion(f"t{ids}", 0, np.array(ids, np.int32), logprobs, FinishReason.STOP, spans)


def make_group(processed: ProcessedPrompt, completions: list[Completion]) -> Group:
    info = PromptInfo("g", "a", processed.input_ids, processed.input_ids)
    rewards = np.zeros(len(completions), np.float32)
    return Group("g", 0, PromptSample(0, (), (), None), processed, info, tuple(completions), rewards)


def test_the_layout_of_the_module_docstring() -> None:
    """Worked out by hand: prompt [10, 11, 12], three completions; the image makes the next position 2, not 3."""
    spans = (VersionSpan(3, 0, 2), VersionSpan(4, 2, 4))
    row = Row(
        prompt([10, 11, 12], next_position=2),
        (completion([20, 21, 22]), completion([30, 31, 32, 33], spans), completion([40])),
        (0.5, -1.0, 0.25),
    )
    packed = pack([Row(prompt([1, 2])), row])
    assert packed.input_ids.tolist() == [1, 2, 10, 11, 12, 20, 21, 30, 31, 32]
    assert packed.branch_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert packed.row_lengths.tolist() == [2, 8]
    assert packed.position_ids.tolist() == [[0, 1, 0, 1, 2, 2, 3, 2, 3, 4]] * 3
    assert packed.predict_from.tolist() == [4, 5, 6, 4, 7, 8, 9, 4]
    assert packed.targets.tolist() == [20, 21, 22, 30, 31, 32, 33, 40]
    assert packed.sequence_ids.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert packed.actor_logprobs.tolist() == [-1, -2, -3, -1, -2, -3, -4, -1]
    assert packed.versions.tolist() == [3, 3, 3, 3, 3, 4, 4, 3]
    assert packed.advantages.tolist() == [0.5, -1.0, 0.25]


def test_media_follow_the_rows_and_filler_goes_where_none_are() -> None:
    image = {"pixel_values": torch.ones(4, 6), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    other = {"pixel_values": torch.full((8, 6), 2.0), "image_grid_thw": torch.tensor([[1, 2, 4]])}
    packed = pack([Row(prompt([1], image)), Row(prompt([2])), Row(prompt([3, 3], other))])
    assert packed.media["pixel_values"][:, 0].tolist() == [1.0] * 4 + [2.0] * 8
    assert packed.media["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 4]]
    filler = prompt([9], image)
    groups = [make_group(prompt([1, 1], other), [completion([5])]), make_group(prompt([2, 2]), [completion([6])])]
    packs = pack_batch(groups, [np.ones(1, np.float32)] * 2, num_ranks=3, filler=filler)
    seen = sorted((p.input_ids.tolist(), p.targets.tolist(), len(p.media["image_grid_thw"])) for [p] in packs)
    assert seen == [([1, 1], [5], 1), ([2, 2, 9], [6], 1), ([9], [], 1)]
    assert {p.truncated.dtype for [p] in packs} == {torch.bool}  # of nothing, too


def test_a_group_over_the_budget_is_split_with_its_prompt_repeated() -> None:
    g = make_group(prompt([1] * 10), [completion([index] * 6) for index in range(5)])  # 10 + 5 * 5 tokens
    [packs] = pack_batch([g], [np.arange(5, dtype=np.float32)], max_tokens=20)
    assert [len(p.input_ids) for p in packs] == [20, 20, 15]
    assert sorted(value for p in packs for value in p.advantages.tolist()) == [0, 1, 2, 3, 4]
    for p in packs:
        assert [p.targets[p.sequence_ids == i][0].item() for i in range(p.num_sequences)] == p.advantages.tolist()


def test_completions_share_a_row_while_that_is_cheaper_than_a_copy_of_the_prompt() -> None:
    """Width 1: a row of l tokens costs l + l^2 / 6. Alone 15 tokens cost 52.5; joining rows of 15, 20, 25 and 30 tokens
    costs 34.2, 42.5, 50.8 and 59.2.
    """
    g = make_group(prompt([1] * 10), [completion([index] * 6) for index in range(5)])
    [[packed]] = pack_batch([g], [np.zeros(5, np.float32)], cost=ModelCost(1))
    assert packed.row_lengths.tolist() == [30, 15]
    [[packed]] = pack_batch([g], [np.zeros(5, np.float32)], cost=ModelCost(2048))
    assert packed.row_lengths.tolist() == [35]


def test_a_single_completion_over_the_budget_is_alone() -> None:
    g = make_group(prompt([1] * 10), [completion([2] * 50), completion([3] * 2)])
    [packs] = pack_batch([g], [np.zeros(2, np.float32)], max_tokens=20)
    assert sorted(len(p.input_ids) for p in packs) == [11, 59]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=12),
    num_ranks=st.integers(1, 4),
    max_tokens=st.integers(8, 60),
    share_prefix=st.booleans(),
)
def test_every_completion_is_in_exactly_one_pack(
    lengths: list[list[int]], num_ranks: int, max_tokens: int, share_prefix: bool
) -> None:
    number = iter(range(1000, 100_000))
    groups = [make_group(prompt([1, 2, 3]), [completion([next(number)] * n) for n in group]) for group in lengths]
    packs = pack_batch(
        groups,
        [np.zeros(len(g), np.float32) for g in lengths],
        num_ranks=num_ranks,
        max_tokens=max_tokens,
        share_prefix=share_prefix,
    )
    assert len(packs) == num_ranks
    assert len({len(rank) for rank in packs}) == 1
    trained = [target for rank in packs for p in rank for target in p.targets.tolist()]
    expected = [token for g in groups for c in g.completions for token in c.token_ids.tolist()]
    assert sorted(trained) == expected
    for p in (p for rank in packs for p in rank):
        assert len(p.input_ids) <= max_tokens or p.num_sequences == 1
        assert int(p.row_lengths.sum()) == len(p.input_ids)
        # Ids of this test say which completion they are of: each target follows itself or the prompt.
        previous = p.input_ids[p.predict_from]
        assert all(a in (b, 3) for a, b in zip(previous.tolist(), p.targets.tolist(), strict=True))


def test_ranks_get_equal_cost() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 4000, 200).tolist()
    row_costs = [ModelCost(2048).text(length) for length in lengths]
    bins = balance(lengths, row_costs, 4, 16_384)
    costs = [sum(row_costs[row] for bin_ in rank for row in bin_) for rank in bins]
    assert max(costs) / min(costs) < 1.02
    assert sorted(row for rank in bins for bin_ in rank for row in bin_) == list(range(200))
    assert all(sum(lengths[row] for row in bin_) <= 16_384 for rank in bins for bin_ in rank)
    fewest = -(-sum(lengths) // (4 * 16_384))
    assert len(bins[0]) <= fewest + 1


def test_a_row_over_the_budget_costs_no_more_micro_batches_than_its_own() -> None:
    assert balance([100] + [1] * 10, [100.0] + [1.0] * 10, 1, 10) == [[[0], list(range(1, 11))]]
    assert balance([100, 1], [100.0, 1.0], 2, 10) == [[[0]], [[1]]]


def test_micro_batches_of_the_same_turn_are_alike() -> None:
    """By hand: rows into bins of 6, 5, 4 and 3 + 3; ranks wait for each other, so the two sixes go together."""
    assert balance([6, 5, 4, 3, 3], [6.0, 5.0, 4.0, 3.0, 3.0], 2, 8) == [[[0], [1]], [[3, 4], [2]]]


def test_images_count_for_the_balance() -> None:
    """One row with an image that costs as much as 30 tokens, and 30 rows of one token: the text goes to one rank."""
    image = {"pixel_values": torch.zeros(10, 6)}
    seen = make_group(prompt([1], image), [completion([2])])
    words = [make_group(prompt([3]), [completion([4])]) for _ in range(30)]
    groups = [seen, *words]
    nothing = [np.zeros(1, np.float32)] * len(groups)
    by_cost = pack_batch(groups, nothing, num_ranks=2, cost=ModelCost(10**9, pixel_value=0.5))
    assert sorted(len(of_rank[0].input_ids) for of_rank in by_cost) == [1, 30]
    by_tokens = pack_batch(groups, nothing, num_ranks=2, cost=ModelCost(10**9))
    assert sorted(len(of_rank[0].input_ids) for of_rank in by_tokens) == [15, 16]


def test_a_copy_of_an_image_is_counted_where_a_group_could_be_split() -> None:
    rows = [(completion([5] * 40), completion([6] * 40))]
    group = make_group(prompt([1] * 4, {"pixel_values": torch.zeros(10, 6)}), list(rows[0]))
    advantages = [np.zeros(2, np.float32)]
    [[apart]] = pack_batch([group], advantages, cost=ModelCost(2))
    [[shared]] = pack_batch([group], advantages, cost=ModelCost(2, pixel_value=10.0))
    assert (len(apart.row_lengths), len(shared.row_lengths)) == (2, 1)


def test_packs_survive_transport_bit_for_bit() -> None:
    image = {"pixel_values": torch.randn(4, 6), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    packs = [pack([Row(prompt([1, 2], image), (completion([5, 6]),), (0.5,))]), pack([Row(prompt([3]))])]
    data = encode_packs(packs)
    assert data.dtype == torch.uint8
    received = decode_packs(data.clone())
    assert len(received) == 2
    for sent, got in zip(packs, received, strict=True):
        assert isinstance(got, PackedBatch)
        assert sent.tensors().keys() == got.tensors().keys()
        assert all(
            torch.equal(value, got.tensors()[name]) and value.dtype == got.tensors()[name].dtype
            for name, value in sent.tensors().items()
        )
        assert sent.media.keys() == got.media.keys()
        assert all(torch.equal(value, got.media[name]) for name, value in sent.media.items())
    with pytest.raises(ValueError, match="not a list of packs"):
        decode_packs(torch.zeros(100, dtype=torch.uint8))


def test_mistakes_are_named() -> None:
    good = make_group(prompt([1]), [completion([2])])
    with pytest.raises(ValueError, match="at least one group"):
        pack_batch([], [])
    with pytest.raises(ValueError, match="1 completions but 2 advantages"):
        pack_batch([good], [np.zeros(2, np.float32)])
    with pytest.raises(ValueError, match="has no tokens"):
        pack_batch([make_group(prompt([1]), [completion([])])], [np.zeros(1, np.float32)])
    with pytest.raises(ValueError, match="has 2 tokens, but its version spans cover 1"):
        pack_batch([make_group(prompt([1]), [completion([2, 3], (VersionSpan(0, 0, 1),))])], [np.zeros(1, np.float32)])
