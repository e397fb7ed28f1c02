"""A full update of live actors (gather, wire, verify, swap) against one flat Gloo broadcast of the same bytes.

As bytes/s, to as many receivers; the flat broadcast goes from and to memory that is in use already. Where cores are few
their time is the bound, so the CPU time of each side is said too.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

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
            update = _Rate(world, lambda world=world: world.update()[0])  # type: ignore[misc]
            broadcast = _Rate(world, world.broadcast)
            comparisons[case] = harness.compare(case, update, broadcast, pairs=options.pairs, goal=GOAL, unit="MB/s")
            harness.say(f"{case}: CPU time of an update {update.cpu_s:.2f} s, of a broadcast {broadcast.cpu_s:.2f} s")
    harness.report("update_vs_broadcast", comparisons)


class _Rate:
    """MB/s of a turn. `cpu_s`: mean CPU time of one, of this process and of those that it has started."""

    def __init__(self, world: World, turn: Callable[[], float]) -> None:
        self.cpu_s = 0.0
        self._world = world
        self._turn = turn
        self._num_turns = 0

    def __call__(self) -> float:
        before_s = _cpu_s()
        seconds = self._turn()
        self._num_turns += 1
        self.cpu_s += (_cpu_s() - before_s - self.cpu_s) / self._num_turns
        rate: float = self._world.num_bytes / 1e6 / seconds
        return rate


def _cpu_s() -> float:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


if __name__ == "__main__":
    main()
