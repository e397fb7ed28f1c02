"""`python -m benchmarks.bad_requests`: what honest callers notice of bad ones.

Ours is the rate at which a caller gets groups with an image, one after the other, while another process sends the
thousand bad calls of `tests/hostile`, one after the other too; the peer is the same actor left in peace. 0.5 says that
a group takes twice as long. The actor has the fake engine, so that what is seen is the server's own time.
"""

import argparse
import asyncio
import itertools
import random
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
NUM_GROUPS = 100
# Small limits: the largest of the bad calls are as large as a server takes, and one just over it.
SETTINGS = (
    "fake.first_token_s=0.02",
    "fake.token_s=0.002",
    "limits.max_media_pixels=524288",
    "limits.max_media_bytes=4194304",
    "limits.max_message_bytes=8388608",
)


def main() -> None:
    """Compare and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bad_requests")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        serving(*FAKE_ACTOR, *SETTINGS, log=Path(name) / "actor.log") as address,
        asyncio.Runner() as runner,
    ):
        turns = itertools.count()

        def in_peace() -> float:
            return runner.run(_groups_per_s(address, next(turns)))

        def under_attack() -> float:
            with serving("benchmarks.attacker_side", address, log=Path(name) / "attacker.log"):
                return runner.run(_groups_per_s(address, next(turns)))

        harness.say("warming up")
        in_peace()
        comparison = harness.compare(
            "honest_rate", under_attack, in_peace, pairs=options.pairs, goal=GOAL, unit="groups/s"
        )
    harness.report("bad_requests", {"honest_rate": comparison})


async def _groups_per_s(address: str, turn: int) -> float:
    client = GrpcClient(address)
    requests = [_request(turn * NUM_GROUPS + index) for index in range(NUM_GROUPS)]
    started_at = time.perf_counter()
    for request in requests:
        await client.generate(request, timeout_s=60)
    seconds = time.perf_counter() - started_at
    await client.close()
    return NUM_GROUPS / seconds


def _request(seed: int) -> RolloutRequest:
    image = images.picture(random.Random(seed))
    sampling = SamplingParams(n=8, max_tokens=8, ignore_eos=True)
    return RolloutRequest(f"g{seed}", TextPrompt("What is this?"), (MediaItem(content_hash(image), image),), sampling)


if __name__ == "__main__":
    main()
