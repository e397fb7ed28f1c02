"""Tokens/s of a training step on sequences of very different length, against one on sequences of equal length.

Both sides pack and train through the learner's own `pack_batch` and `train_step`, with the same tiny Qwen2.5-VL. Ours
has lengths of which the longest is four times the mean: padded to the longest, it would be four times the tokens. The
peer is the ideal of no padding at all: the same number of tokens, all trained on, in sequences of the one length for
which attention sees as many pairs of tokens too, sum(l^2) / sum(l). What the ratio lacks to 1 is the price of packing.

Beforehand the loss and the gradients of a packed batch must be those of its sequences one by one.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import harness
from benchmarks.harness import say

if TYPE_CHECKING:
    from benchmarks.learner_side import LearnerSide
    from common.types import FloatArray
    from learner.types import Group

CASE = "long_tail"
GOAL = 0.95
NUM_SEQUENCES = 128
LONGEST = 512
NUM_STEPS = 3
MAX_DIFFERENCE = 1e-4


def main() -> None:
    """Run the case and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packed_step", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    pairs: int = parser.parse_args().pairs
    from benchmarks.learner_side import LearnerSide
    from examples.digits.model import build_model
    from learner.config.algorithm import AlgorithmConfig

    lengths = skewed_lengths(NUM_SEQUENCES, LONGEST)
    ideal = equal_lengths(lengths)
    say(f"{sum(lengths)} tokens a step in {len(lengths)} sequences of 1 to {max(lengths)}")
    say(f"padded to the longest: {len(lengths) * max(lengths) / sum(lengths):.2f} times the tokens")
    say(f"the ideal: {len(ideal)} sequences of {ideal[-1]} to {ideal[0]}")
    with tempfile.TemporaryDirectory() as temporary:
        side = LearnerSide(build_model(Path(temporary), seed=0), AlgorithmConfig())
    _require_equal_gradients(side, skewed_lengths(16, 64))

    def turn(lengths: Sequence[int]) -> Callable[[], float]:
        groups = make_groups(lengths)
        return lambda: _rate(side, groups, sum(lengths))

    ours, peer = turn(lengths), turn(ideal)
    ours()
    peer()
    result = harness.compare(CASE, ours, peer, pairs=pairs, goal=GOAL, unit="tokens/s")
    harness.report("packed_step", {CASE: result})


def skewed_lengths(num: int, longest: int) -> list[int]:
    """longest * u^3 for u evenly spread over 0 to 1: a long tail, whose mean is a quarter of the longest."""
    return [max(1, round(longest * ((index + 0.5) / (num - 0.5)) ** 3)) for index in range(num)]


def equal_lengths(lengths: Sequence[int]) -> list[int]:
    """As many tokens in sequences of one length (or one more), with as many pairs of tokens of the same sequence."""
    tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
    num = round(tokens**2 / pairs)
    return [tokens // num + (index < tokens % num) for index in range(num)]


def make_groups(lengths: Sequence[int]) -> "list[Group]":
    """A group of one completion for each length, of random letters, in random order.

    The prompt is one token and the last token of a completion is no input, so that a sequence of n tokens has n inputs
    and n targets.
    """
    from benchmarks.learner_side import group
    from learner.types import ProcessedPrompt

    rng = np.random.default_rng(0)
    groups = []
    for sequence, length in enumerate(rng.permutation(lengths)):
        positions = np.zeros((3, 1), np.int64)
        prompt = ProcessedPrompt(np.array([65], np.int32), positions, 1, {}, (), ())
        token_ids = rng.integers(65, 91, length).astype(np.int32)
        logprobs = -rng.uniform(4, 7, length).astype(np.float32)
        groups.append(group(sequence, prompt, [token_ids], [logprobs]))
    return groups


def advantages(groups: "Sequence[Group]") -> "list[FloatArray]":
    """1 and -1 by turns."""
    return [np.array([1.0 if index % 2 else -1.0], np.float32) for index in range(len(groups))]


def _rate(side: "LearnerSide", groups: "Sequence[Group]", num_tokens: int) -> float:
    """Tokens/s of packing a batch and training on it."""
    from learner.batch.packing import pack_batch

    started_at = time.perf_counter()
    for _ in range(NUM_STEPS):
        [packs] = pack_batch(groups, advantages(groups), cost=side.cost)
        stats = side.train(packs)
        harness.require_equal("tokens through the model", stats.num_input_tokens, num_tokens)
        harness.require_equal("tokens trained on", stats.num_tokens, num_tokens)
    return NUM_STEPS * num_tokens / (time.perf_counter() - started_at)


def _require_equal_gradients(side: "LearnerSide", lengths: Sequence[int]) -> None:
    from benchmarks.learner_side import require_close_gradients
    from learner.batch.packing import Row, pack, pack_batch

    groups = make_groups(lengths)
    values = advantages(groups)
    [packs] = pack_batch(groups, values)
    alone = [
        pack([Row(group.processed, group.completions, tuple(advantage.tolist()))])
        for group, advantage in zip(groups, values, strict=True)
    ]
    (loss, packed), (expected_loss, expected) = side.gradients(packs), side.gradients(alone)
    harness.require_close("the loss of a packed batch", loss, expected_loss, MAX_DIFFERENCE)
    require_close_gradients(packed, expected, MAX_DIFFERENCE)
    say(f"{len(lengths)} sequences packed and one by one: loss {loss:.6f} and {expected_loss:.6f}, equal gradients")


if __name__ == "__main__":
    main()
