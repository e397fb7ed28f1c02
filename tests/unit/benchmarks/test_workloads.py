"""The workloads that benchmarks make up are what their documentation says."""

import hashlib

import numpy as np
import pytest

from benchmarks import image_ingress, overlap, packed_step, step_vs_trl
from examples.digits.model import TOKEN_IDS


def test_padding_to_the_longest_costs_four_times_the_tokens() -> None:
    lengths = packed_step.skewed_lengths(packed_step.NUM_SEQUENCES, packed_step.LONGEST)
    assert (len(lengths), min(lengths), max(lengths)) == (128, 1, 512)
    assert len(lengths) * max(lengths) / sum(lengths) == pytest.approx(4.0, rel=0.02)


def test_the_ideal_has_the_same_tokens_and_attends_to_as_many_pairs() -> None:
    lengths = packed_step.skewed_lengths(packed_step.NUM_SEQUENCES, packed_step.LONGEST)
    ideal = packed_step.equal_lengths(lengths)
    assert sum(ideal) == sum(lengths)
    assert max(ideal) - min(ideal) <= 1
    assert sum(n**2 for n in ideal) == pytest.approx(sum(n**2 for n in lengths), rel=0.02)
    # By hand: 8 tokens and 1 + 1 + 36 = 38 pairs; 64 / 38 rounds to 2 sequences.
    assert packed_step.equal_lengths([1, 1, 6]) == [4, 4]
    assert packed_step.equal_lengths([3, 3, 3]) == [3, 3, 3]
    assert packed_step.equal_lengths([3, 3, 4]) == [4, 3, 3]


def test_every_token_of_a_made_up_group_is_an_input_and_a_target() -> None:
    groups = packed_step.make_groups([5, 1, 3])
    sizes = [len(group.processed.input_ids) + len(group.completions[0].token_ids) - 1 for group in groups]
    assert sorted(sizes) == sorted(len(group.completions[0].token_ids) for group in groups) == [1, 3, 5]
    assert [values.tolist() for values in packed_step.advantages(groups)] == [[-1.0], [1.0], [-1.0]]


def test_completions_are_geometric_with_a_cap() -> None:
    groups = [group for seed in range(20) for group in step_vs_trl.make_batch(seed)]
    completions = [ids for group in groups for ids in group.completions]
    lengths = np.array([len(ids) for ids in completions])
    assert len(completions) == 20 * 32 * 8
    assert lengths.mean() == pytest.approx(12.0, rel=0.05)
    assert np.median(lengths) == pytest.approx(8, abs=1)  # ln 2 / -ln(1 - 1/12) = 7.97
    assert lengths.max() <= 128
    ends = np.array([ids[-1] == TOKEN_IDS["<|im_end|>"] for ids in completions])
    assert (ends | (lengths == 128)).all()
    assert sum(TOKEN_IDS["<|im_end|>"] in ids[:-1] for ids in completions) == 0
    assert all(len(a) == len(b) for group in groups for a, b in zip(group.completions, group.old_logprobs, strict=True))


def test_batches_differ_and_repeat() -> None:
    assert step_vs_trl.make_batch(1) == step_vs_trl.make_batch(1)
    assert step_vs_trl.make_batch(1) != step_vs_trl.make_batch(2)
    rows = [group.row for seed in range(step_vs_trl.NUM_BATCHES) for group in step_vs_trl.make_batch(seed)]
    assert len(set(rows)) == len(rows)


def test_an_image_of_a_mebibyte_is_one_and_another_each_time() -> None:
    images = dict(image_ingress._image(seed) for seed in range(3))
    assert len(images) == 3
    for sha256, image in images.items():
        assert hashlib.sha256(image).digest() == sha256
        assert len(image) == pytest.approx(2**20, rel=0.01)


def test_traces_have_the_mean_and_the_tail_that_they_say() -> None:
    even, heavy = overlap.even_lengths(), overlap.heavy_lengths()
    assert np.mean(even) == pytest.approx(200, rel=0.01)
    assert (min(even), max(even)) == (100, 300)
    assert np.mean(heavy) == pytest.approx(200, rel=0.01)
    assert max(heavy) == pytest.approx(10 * 200, rel=0.05)
    # A log-normal's mean is exp(0.8^2 / 2) = 1.377 times its median.
    assert np.median(heavy) == pytest.approx(200 / 1.377, rel=0.02)
    # In random order: every batch has some of the tail.
    batches = np.reshape(heavy, (-1, overlap.BATCH * overlap.GROUP_SIZE))
    assert batches.max(axis=1).min() > 5 * 200
