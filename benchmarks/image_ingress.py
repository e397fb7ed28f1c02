"""`python -m benchmarks.image_ingress`: images of 1 MiB into an actor, against base64 in JSON over HTTP.

Both sides go from PNG files in the client's memory to files in the server's store, hashed and with their headers
checked: to the actor the images of a turn in one call, to the peer each in a request, as its users send them. Each
image is another one, whose sha256 is known before the clock starts, and both servers must say the same. Both stores are
full before the clock starts, as those of servers that have been up for a while: an image takes the place of another
one. The peer is `http_ingress_side`; all loops are uvloop's.
"""

import argparse
import asyncio
import base64
import hashlib
import io
import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from actor.config import LimitsConfig
from benchmarks import harness
from benchmarks.serving import FAKE_ACTOR, serving

GOAL = 10.0
NUM_IMAGES = 24
SIZE = 590  # squared and times three: 0.996 MiB of noise, which no PNG makes smaller
TURNS_TO_FILL = LimitsConfig().media_store_bytes // (NUM_IMAGES * SIZE * SIZE * 3) + 2

Send = Callable[[Mapping[bytes, bytes]], Awaitable[list[bytes]]]
"""Images by their sha256, to the sha256 that the server says."""


def main() -> None:
    """Compare and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.image_ingress")
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    import uvloop

    with (
        tempfile.TemporaryDirectory() as name,
        serving(*FAKE_ACTOR, log=Path(name) / "actor.log") as ours,
        serving("benchmarks.http_ingress_side", log=Path(name) / "peer.log") as peer,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        _to_actor(ours, runner) as to_ours,
        _to_http(peer, runner) as to_peer,
    ):
        rates = {who: _Rate(send, runner) for who, send in (("ours", to_ours), ("peer", to_peer))}
        harness.say("filling both stores")
        for _ in range(TURNS_TO_FILL):
            for rate in rates.values():
                rate()
        comparison = harness.compare(
            "mib_1", rates["ours"], rates["peer"], pairs=options.pairs, goal=GOAL, unit="images/s"
        )
    harness.report("image_ingress", {"mib_1": comparison})


class _Rate:
    """Images/s of a turn; no turn has images of another one of the same side."""

    def __init__(self, send: Send, runner: asyncio.Runner) -> None:
        self._send = send
        self._runner = runner
        self._num_turns = 0

    def __call__(self) -> float:
        images = dict(_image(self._num_turns * NUM_IMAGES + i) for i in range(NUM_IMAGES))
        self._num_turns += 1
        started_at = time.perf_counter()
        stored = self._runner.run(self._run(images))
        seconds = time.perf_counter() - started_at
        harness.require_equal("hashes", stored, list(images))
        return NUM_IMAGES / seconds

    async def _run(self, images: Mapping[bytes, bytes]) -> list[bytes]:
        return await self._send(images)


def _image(seed: int) -> tuple[bytes, bytes]:
    """The sha256, and a PNG of noise."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return hashlib.sha256(buffer.getvalue()).digest(), buffer.getvalue()


@contextmanager
def _to_actor(address: str, runner: asyncio.Runner) -> Iterator[Send]:
    from common.client import GrpcClient

    async def connect() -> GrpcClient:
        return GrpcClient(address)

    client = runner.run(connect())

    async def send(images: Mapping[bytes, bytes]) -> list[bytes]:
        await client.upload(images)  # raises unless the actor has stored all, each under its hash
        return list(images)

    yield send
    runner.run(client.close())


@contextmanager
def _to_http(address: str, runner: asyncio.Runner) -> Iterator[Send]:
    import aiohttp

    async def connect() -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    session = runner.run(connect())

    async def send_one(image: bytes) -> bytes:
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        body = json.dumps({"image_url": {"url": url}})
        headers = {"Content-Type": "application/json"}
        async with session.post(f"http://{address}/v1/images", data=body, headers=headers) as answer:
            return bytes.fromhex((await answer.json())["sha256"])

    async def send(images: Mapping[bytes, bytes]) -> list[bytes]:
        return await asyncio.gather(*map(send_one, images.values()))

    yield send
    runner.run(session.close())


if __name__ == "__main__":
    main()
