"""Completions/s of the steady state: the demo's trainer against TRL's GRPOTrainer with transformers' generate.

Both sides train the same tiny Qwen2.5-VL in float32 on the same scans, with the same batch, cap, optimizer and
learning rate, one optimizer step for each batch. Case `two_tokens` is the demo: an answer is a digit and the end of
the turn. Case `long_tail` is what reasoning looks like: lengths are geometric with mean 12, so a batch waits for its
longest answer.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness, peers
from benchmarks.harness import say
from benchmarks.side import Side, Turn

GOALS = {"two_tokens": 1.0, "long_tail": 2.0}
# Steps of a turn, and how many of them come before the steady state: the pipeline fills, caches warm up.
NUM_STEPS = {"two_tokens": 13, "long_tail": 7}
NUM_SKIPPED = 3
SHIM = Path(__file__).resolve().parents[1] / "common" / "torchvision_ops.py"


def main() -> None:
    """Run every case and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_vs_trl", description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=list(GOALS), default=list(GOALS))
    options = parser.parse_args()
    python = peers.python()
    with tempfile.TemporaryDirectory() as temporary:
        comparisons = {case: _run(case, Path(temporary) / case, python, options.pairs) for case in options.cases}
    harness.report("demo_vs_trl", comparisons)


def _run(case: str, folder: Path, python: Path, pairs: int) -> harness.Comparison:
    # They load torch, which `--help` need not wait for.
    from benchmarks import workload
    from benchmarks.outrider_side import OutriderSide

    say(f"{case}: building the model and the data")
    work = workload.build(folder, case)
    say(f"{case}: starting both sides (about a minute)")
    trl_command: list[str | Path] = [python, "-m", "benchmarks.trl_side", folder, SHIM]
    with OutriderSide(folder, work) as ours, Side(trl_command, folder / "trl.log") as trl:
        for name, value in ours.facts.items():
            harness.require_equal(name, value, trl.facts[name])
        steps = NUM_STEPS[case]

        def turn(take: Callable[[int], Turn]) -> float:
            done = take(steps)
            harness.require_equal("completions of a turn", done.completions, steps * work.completions_per_step)
            harness.require_close("mean length", done.mean_length, work.expected_length, work.length_tolerance)
            timed = done.step_s[NUM_SKIPPED:]
            return work.completions_per_step * len(timed) / sum(timed)

        say(f"{case}: {work.completions_per_step} completions a step, {steps - NUM_SKIPPED} timed steps a turn")
        turn(ours.take)
        turn(trl.take)
        return harness.compare(
            case, lambda: turn(ours.take), lambda: turn(trl.take), pairs=pairs, goal=GOALS[case], unit="completions/s"
        )


if __name__ == "__main__":
    main()
