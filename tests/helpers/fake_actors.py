"""What the fixtures of `tests/contract` hand out: running actors with the fake engine; and images to send to them."""

import asyncio
import io
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from PIL import Image

from actor.engine_fake.engine import FakeEngine
from actor.server import ActorServer


@dataclass
class FakeActor:
    """A running actor and a client of it."""

    address: str
    engine: FakeEngine
    server: ActorServer
    channel: grpc.aio.Channel
    rollouts: Any
    weights: Any
    admin: Any


StartActor = Callable[..., Awaitable[FakeActor]]


@dataclass
class Running:
    process: asyncio.subprocess.Process
    address: str = ""

    async def exit_code(self, timeout_s: float = 10) -> int:
        async with asyncio.timeout(timeout_s):
            return await self.process.wait()


Launch = Callable[..., Awaitable[Running]]


def png(seed: int = 0, size: int = 8, image_format: str = "PNG") -> bytes:
    """A small image that is another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()
