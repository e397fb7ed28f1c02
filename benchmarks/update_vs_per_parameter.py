"""A full update of a live actor against sending its parameters one by one, as TRL's vLLM client does it.

As bytes/s. For each parameter TRL makes a call to the server, broadcasts the tensor, and waits at a barrier; so does
the peer here, with a cheap gRPC call in place of an HTTP request. It leaves out gathering and loading, which ours has.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks import harness
from benchmarks.update_world import World

GOAL = 5.0


def main() -> None:
    """Run the one case and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update_vs_per_parameter", description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    pairs: int = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as temporary, World(Path(temporary), 1) as world:
        megabytes = world.num_bytes / 1e6
        sizes = world.parameter_sizes()
        world.broadcast(sizes, with_calls=True)
        comparison = harness.compare(
            "one_receiver",
            lambda: megabytes / world.update()[0],
            lambda: megabytes / world.broadcast(sizes, with_calls=True),
            pairs=pairs,
            goal=GOAL,
            unit="MB/s",
        )
    harness.report("update_vs_per_parameter", {"one_receiver": comparison})


if __name__ == "__main__":
    main()
