"""A thousand calls that a server must refuse, to a real process, while others ask it honestly."""

import asyncio
import collections
import itertools
from pathlib import Path
from typing import Any

import psutil

from common.client import GrpcClient
from common.media import content_hash
from common.rpc.channel import open_channel
from common.types import ActorState, MediaItem, RolloutRequest, SamplingParams, ServerLimits, TextPrompt
from tests.helpers.fake_actors import Launch, png
from tests.hostile.calls import send
from tests.hostile.requests import KINDS, bad_calls

NUM_CALLS = 1000
AT_ONCE = 8
FAKE_VOCAB_SIZE = 320
LIMITS = {"max_media_pixels": 2**19, "max_media_bytes": 2**20, "max_message_bytes": 2**22}
# One decoded image of the largest size and one message, of each call at once, and as much again for buffers.
MAX_GROWTH_BYTES = 2 * AT_ONCE * (3 * LIMITS["max_media_pixels"] + LIMITS["max_message_bytes"])


async def _refuse_all(address: str, seed: int, limits: ServerLimits) -> None:
    """Send them, some at a time; each must be refused as it should."""
    calls = itertools.islice(bad_calls(seed, limits, FAKE_VOCAB_SIZE), NUM_CALLS)
    channel = open_channel(address)
    surprises: list[Any] = []
    counts: collections.Counter[str] = collections.Counter()

    async def send_some() -> None:
        for call in calls:  # one iterator for all of these
            counts[call.kind] += 1
            error = await send(channel, call)
            if not call.is_answered_by(error):
                surprises.append((call.kind, repr(error)))

    await asyncio.gather(*(send_some() for _ in range(AT_ONCE)))
    await channel.close()
    assert surprises == []
    assert min(counts[kind] for kind in KINDS) >= NUM_CALLS // len(KINDS)
    assert counts.total() == NUM_CALLS


def _honest(index: int) -> RolloutRequest:
    sampling = SamplingParams(n=4, seed=1000 * index, max_tokens=8)
    image = MediaItem(content_hash(png(index)), png(index))
    return RolloutRequest(f"honest-{index}", TextPrompt("What is this?"), (image,), sampling)


async def _ask(client: GrpcClient, index: int) -> list[list[int]]:
    sampled = await client.generate(_honest(index), timeout_s=30)
    return [completion.token_ids.tolist() for completion in sampled.completions]


async def test_a_thousand_bad_requests(launch: Launch) -> None:
    """Each is refused by name, within the memory that the limits allow; the others get the answers they always get."""
    limits = [f"limits.{name}={value}" for name, value in LIMITS.items()]
    actor = await launch("--engine", "fake", "--standalone", "--listen", "127.0.0.1:0", "fake.max_videos=2", *limits)
    process = psutil.Process(actor.process.pid)
    client = GrpcClient(actor.address)
    expected = [await _ask(client, index) for index in range(16)]
    before = process.memory_info().rss
    bad = asyncio.create_task(_refuse_all(actor.address, 1, (await client.server_info()).limits))
    num_asked = 0
    while not bad.done():
        index = num_asked % len(expected)
        assert await _ask(client, index) == expected[index]
        num_asked += 1
    await bad
    assert num_asked >= len(expected)
    assert _peak_bytes(process.pid) - before <= MAX_GROWTH_BYTES
    status = await client.status()
    assert (status.state, status.num_running, status.num_waiting) == (ActorState.SERVING, 0, 0)
    await client.close()


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
