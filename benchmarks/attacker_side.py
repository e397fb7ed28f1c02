"""The one who sends bad calls in `bad_requests`: the thousand of `tests/hostile`, again and again, until it is ended.

`python -m benchmarks.attacker_side HOST:PORT CALLS_AT_ONCE`; each refusal must be the one that the call deserves.
"""

import asyncio
import itertools
import sys
from collections.abc import Iterator

import grpc

from common.client import GrpcClient
from common.rpc.channel import open_channel
from tests.hostile.calls import BadCall, send
from tests.hostile.requests import bad_calls

NUM_CALLS = 1000
VOCAB_SIZE = 320


async def main(address: str, at_once: int) -> None:
    """`at_once` at any time."""
    client = GrpcClient(address)
    limits = (await client.server_info()).limits
    await client.close()
    calls = itertools.cycle(list(itertools.islice(bad_calls(0, limits, VOCAB_SIZE), NUM_CALLS)))
    channel = open_channel(address)
    print(f"attacker ready on {address}", flush=True)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(_send(channel, calls))


async def _send(channel: grpc.aio.Channel, calls: Iterator[BadCall]) -> None:
    """One call after the other, of an iterator that others use too."""
    for call in calls:
        error = await send(channel, call)
        if not call.is_answered_by(error):
            raise RuntimeError(f"{call.kind} was answered by {error!r}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
