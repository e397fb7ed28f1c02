"""A full update of live actors (gather, wire, verify, swap) against one flat Gloo broadcast of the same bytes.

As bytes/s, to as many receivers; the flat broadcast goes from and to memory that is in use already.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks import harness
from benchmarks.update_world import World

CASES = {"one_receiver": 1, "two_receivers": 2}
GOAL = 0.9


def main() -> None:
    """Run both cases and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update_vs_broadcast", description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    options = parser.parse_args()
    comparisons = {}
    for case in options.cases:
        with tempfile.TemporaryDirectory() as temporary, World(Path(temporary), CASES[case]) as world:
            megabytes = world.num_bytes / 1e6
            comparisons[case] = harness.compare(
                case,
                lambda world=world, size=megabytes: size / world.update()[0],  # type: ignore[misc]
                lambda world=world, size=megabytes: size / world.broadcast(),  # type: ignore[misc]
                pairs=options.pairs,
                goal=GOAL,
                unit="MB/s",
            )
    harness.report("update_vs_broadcast", comparisons)


if __name__ == "__main__":
    main()
