"""How much of generation and training goes on at the same time.

The stages only take time (`benchmarks/simulated.py`): two actors with the fake engine whose completions have the
lengths of a trace, and a training step of fixed duration. All between them is the learner's own: credits, dispatcher,
gRPC, rewards, buffer, trainer loop, weight updates.

Case `balanced`: a batch takes as long to generate, by arithmetic, as to train. The ideal step takes as long as the
longer of the two; the ratio is that time over the mean step of a run. Case `heavy_tail`: tokens/s of whole runs whose
longest completions take ten times the mean, at staleness 2 against the synchronous run of the same prompts with the
same lengths. In both, each step notes how stale its oldest token is: one beyond the bound is an error.
"""

import argparse
import itertools
import math
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import UnequalWorkError, require_equal, say

if TYPE_CHECKING:
    from benchmarks.simulated import Run

GOALS = {"balanced": 0.95, "heavy_tail": 2.0}
MAX_STALENESS = 2
NUM_ACTORS = 2
SLOTS_PER_ACTOR = 64
BATCH, GROUP_SIZE = 32, 8
TOKEN_S = 0.002
MEAN_TOKENS = 200
_NUM_STEPS = 24
# Steps in which generation has not begun in earnest, or has nothing more to do.
_WARM_UP, _RUN_OUT = 4, MAX_STALENESS + 1
_NUM_LENGTHS = 1024
_CONTEXT = 16384


def main() -> None:
    """Run the cases and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=GOALS, default=list(GOALS))
    options = parser.parse_args()
    cases = {"balanced": _balanced, "heavy_tail": _heavy_tail}
    with tempfile.TemporaryDirectory() as temporary:
        results = {}
        for name in options.cases:
            folder = Path(temporary) / name
            folder.mkdir()
            results[name] = cases[name](folder, options.pairs)
    harness.report("overlap", results)


def even_lengths() -> list[int]:
    """Evenly spread around the mean, half of it to each side, in random order."""
    lengths = [round(MEAN_TOKENS * (0.5 + (i + 0.5) / _NUM_LENGTHS)) for i in range(_NUM_LENGTHS)]
    random.Random(0).shuffle(lengths)
    return lengths


def heavy_lengths() -> list[int]:
    """Log-normal with sigma 0.8, by its quantiles, in random order: the longest is ten times the mean."""
    normal = statistics.NormalDist(sigma=0.8)
    weights = [math.exp(normal.inv_cdf((i + 0.5) / _NUM_LENGTHS)) for i in range(_NUM_LENGTHS)]
    scale = MEAN_TOKENS / statistics.fmean(weights)
    lengths = [max(1, round(scale * weight)) for weight in weights]
    random.Random(0).shuffle(lengths)
    return lengths


def generation_s(num_tokens: float) -> float:
    """How long the actors take for so many tokens if every slot is always busy."""
    return num_tokens * TOKEN_S / (NUM_ACTORS * SLOTS_PER_ACTOR)


def _balanced(folder: Path, num_rounds: int) -> harness.Comparison:
    training_s = generation_s(BATCH * GROUP_SIZE * MEAN_TOKENS)
    runs = _runs(folder, even_lengths(), training_s, itertools.repeat(MAX_STALENESS, num_rounds))
    ratios = []
    for run in runs:
        steady = run.steps[_WARM_UP:-_RUN_OUT]
        step_s = statistics.fmean(step["step_s"] for step in steady)
        generated_s = generation_s(statistics.fmean(step["num_tokens"] for step in steady))
        ratios.append(max(generated_s, training_s) / step_s)
        say(
            f"balanced, round {len(ratios)} of {num_rounds}: generation {generated_s:.3f} s, training "
            f"{training_s:.3f} s, a step {step_s:.3f} s, ratio {ratios[-1]:.3f}"
        )
    return harness.Comparison(tuple(ratios), GOALS["balanced"])


def _heavy_tail(folder: Path, num_pairs: int) -> harness.Comparison:
    lengths = heavy_lengths()
    say(f"heavy_tail: lengths of {min(lengths)} to {max(lengths)} tokens, mean {statistics.fmean(lengths):.0f}")
    training_s = generation_s(BATCH * GROUP_SIZE * MEAN_TOKENS)
    runs = _runs(folder, lengths, training_s, itertools.cycle((MAX_STALENESS, 0)))
    done: list[Run] = []

    def rate() -> float:
        run = next(runs)
        done.append(run)
        if len(done) > 1:
            require_equal("prompts", run.sequences, done[0].sequences)
            require_equal("tokens", run.num_tokens, done[0].num_tokens)
        return run.num_tokens / run.seconds

    return harness.compare("heavy_tail", rate, rate, pairs=num_pairs, goal=GOALS["heavy_tail"], unit="tokens/s")


def _runs(folder: Path, lengths: Sequence[int], step_s: float, stalenesses: "Iterator[int]") -> "Iterator[Run]":
    """Runs one after the other on the same actors, each with the next bound on its staleness."""
    from benchmarks.simulated import fake_actors, make_prompts, train

    engine = {
        "lengths": list(lengths),
        "max_context_tokens": _CONTEXT,
        "max_num_seqs": SLOTS_PER_ACTOR,
        "first_token_s": TOKEN_S,
        "token_s": TOKEN_S,
    }
    prompts = make_prompts(BATCH * _NUM_STEPS)
    with fake_actors(folder, NUM_ACTORS, engine) as addresses:
        rollout = {"actors": addresses, "min_actors": NUM_ACTORS, "n": GROUP_SIZE, "max_tokens": max(lengths)}
        for number, max_staleness in enumerate(stalenesses):
            trainer: dict[str, Any] = {"batch_prompts": BATCH, "total_steps": _NUM_STEPS}
            trainer |= {"max_staleness": max_staleness, "max_tokens_per_micro_batch": _CONTEXT}
            run = train(folder / f"run-{number}", prompts, step_s=step_s, rollout=rollout, trainer=trainer)
            if max(run.staleness) > max_staleness:
                raise UnequalWorkError(
                    f"a token of staleness {max(run.staleness)} was trained; {max_staleness} is allowed"
                )
            dropped = run.steps[-1]["groups_dropped"]
            say(f"staleness at most {max_staleness}: {max(run.staleness)} trained, {dropped or 'nothing'} dropped")
            yield run


if __name__ == "__main__":
    main()
