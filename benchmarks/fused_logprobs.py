"""Log-probabilities of a large vocabulary: `completion_logprobs(fused=True)` against whole logits.

Forward and backward pass of the same tiny Qwen2.5-VL, but with a vocabulary of 150,000, over the same pack, in two
processes that take turns. Case `memory` compares what a turn needs at its peak over the loaded model, gradients
included, as completion tokens a GiB; case `speed` tokens/s of the same turns. Losses and the norm of every parameter's
gradient must be equal.

The wider the model, the more of the time is the output layer's matrix product, which `fused` does twice:
`--hidden-size` shows it.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import say
from benchmarks.side import Process

GOALS = {"memory": 5.0, "speed": 1.0}
MAX_DIFFERENCE = 1e-3


def main() -> None:
    """Run both cases, on the same turns, and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fused_logprobs", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    say(f"{options.tokens} tokens, hidden size {options.hidden_size}; starting both sides")
    command = [sys.executable, "-m", "benchmarks.fused_logprobs_side", str(options.hidden_size), str(options.tokens)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with (
            Process([*command, "fused"], folder / "fused") as ours,
            Process([*command, "full"], folder / "full") as peer,
        ):
            _require_equal_results(ours.ask({}), peer.ask({}))  # warms up too
            turns = [(ours.ask({}), peer.ask({})) for _ in range(options.pairs)]
    comparisons = {}
    for case, unit in (("memory", "tokens/GiB"), ("speed", "tokens/s")):
        rates = [tuple(_rate(case, answer, options.tokens) for answer in turn) for turn in turns]
        our_rates, peer_rates = (iter(side) for side in zip(*rates, strict=True))
        comparisons[case] = harness.compare(
            case,
            our_rates.__next__,
            peer_rates.__next__,
            pairs=options.pairs,
            goal=GOALS[case],
            unit=unit,
        )
    harness.report("fused_logprobs", comparisons)


def _rate(case: str, answer: dict[str, Any], tokens: int) -> float:
    """Of a turn: tokens a second, or a GiB of its peak."""
    return float(tokens / (answer["seconds"] if case == "speed" else answer["peak_bytes"] / 2**30))


def _require_equal_results(ours: dict[str, Any], peer: dict[str, Any]) -> None:
    for name in ("loss", "logprobs", "entropy"):
        harness.require_close(name, ours[name], peer[name], MAX_DIFFERENCE)
    harness.require_equal("parameters with a gradient", sorted(ours["gradients"]), sorted(peer["gradients"]))
    for name, norm in peer["gradients"].items():
        harness.require_close(f"the gradient of {name}", ours["gradients"][name], norm, MAX_DIFFERENCE)
    say(f"equal logprobs, entropy and gradients: loss {ours['loss']:.6f} and {peer['loss']:.6f}")


if __name__ == "__main__":
    main()
