"""`python -m benchmarks.bad_requests`: what honest callers notice of bad ones.

Ours is the time in which a caller gets a group with an image, one after the other, while another process sends the
thousand bad calls of `tests/hostile`, one after the other too or `--at-once`; the peer is the same actor left in peace.
The cases are the median and the 99th percentile, each as a rate, 1 / seconds: 0.5 says that a group takes twice as
long. The actor has the fake engine, whose groups take 5.5 ms, so that what is seen is the server's own time; and what
the processes of both callers take of the machine, where it has no cores to spare.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.serving import FAKE_ACTOR, serving
from common.client import GrpcClient
from common.media import content_hash
from common.types import MediaItem, RolloutRequest, SamplingParams, TextPrompt
from tests.hostile import images

GOAL = 0.5
NUM_GROUPS = 400
PERCENTILES = {"p50": 50, "p99": 99}
# Small limits: the largest of the bad calls are as large as a server takes, and one just over it.
SETTINGS = (
    "fake.first_token_s=0.002",
    "fake.token_s=0.0005",
    "limits.max_media_pixels=524288",
    "limits.max_media_bytes=4194304",
    "limits.max_message_bytes=8388608",
)


def main() -> None:
    """Compare and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bad_requests")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=1, help="bad calls at any time")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        serving(*FAKE_ACTOR, *SETTINGS, log=Path(name) / "actor.log") as address,
        asyncio.Runner() as runner,
    ):
        turns = itertools.count()

        def in_peace() -> dict[str, float]:
            return runner.run(_rates(address, next(turns)))

        def under_attack() -> dict[str, float]:
            with serving("benchmarks.attacker_side", address, str(options.at_once), log=Path(name) / "attacker.log"):
                return runner.run(_rates(address, next(turns)))

        harness.say("warming up")
        in_peace()
        pairs = [(under_attack(), in_peace()) for _ in range(options.pairs)]
    comparisons = {
        case: harness.compare_measured(
            case, [ours[case] for ours, _ in pairs], [peer[case] for _, peer in pairs], goal=GOAL, unit="groups/s"
        )
        for case in PERCENTILES
    }
    harness.report("bad_requests", comparisons)


async def _rates(address: str, turn: int) -> dict[str, float]:
    """1 / seconds of the group at each percentile."""
    client = GrpcClient(address)
    seconds = []
    for request in [_request(turn * NUM_GROUPS + index) for index in range(NUM_GROUPS)]:
        started_at = time.perf_counter()
        await client.generate(request, timeout_s=60)
        seconds.append(time.perf_counter() - started_at)
    await client.close()
    at = statistics.quantiles(seconds, n=100)
    return {case: 1 / at[percentile - 1] for case, percentile in PERCENTILES.items()}


def _request(seed: int) -> RolloutRequest:
    image = images.picture(random.Random(seed))
    sampling = SamplingParams(n=8, max_tokens=8, ignore_eos=True)
    return RolloutRequest(f"g{seed}", TextPrompt("What is this?"), (MediaItem(content_hash(image), image),), sampling)


if __name__ == "__main__":
    main()
