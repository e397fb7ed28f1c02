"""Actors with the fake engine on real sockets: in the test's own event loop, or as a process of their own."""

import asyncio
import io
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from actor.config import ActorConfig
from actor.engine_fake.engine import FakeEngine
from actor.server import ActorServer
from common.pb.admin.v1.admin_pb2_grpc import AdminServiceStub
from common.pb.rollout.v1.rollout_pb2_grpc import RolloutServiceStub
from common.pb.weights.v1.weights_pb2_grpc import WeightServiceStub
from common.rpc.channel import open_channel

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture
async def start_actor() -> AsyncIterator[StartActor]:
    """Starts actors: `await start_actor(standalone=True, fake={"token_s": 0})`."""
    actors: list[FakeActor] = []

    async def start(**values: Any) -> FakeActor:
        config = ActorConfig.model_validate({"engine": "fake", "standalone": True} | values)
        engine = FakeEngine(config.fake, "actor-1")
        server = ActorServer(engine, await engine.start(), config, "actor-1")
        address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
        channel = open_channel(address, default_timeout_s=10)
        stubs = RolloutServiceStub(channel), WeightServiceStub(channel), AdminServiceStub(channel)
        actor = FakeActor(address, engine, server, channel, *stubs)
        actors.append(actor)
        return actor

    yield start
    for actor in actors:
        await actor.channel.close()
        await actor.server.stop(grace_s=0)
        await actor.engine.stop()


@dataclass
class Running:
    process: asyncio.subprocess.Process
    address: str = ""

    async def exit_code(self, timeout_s: float = 10) -> int:
        async with asyncio.timeout(timeout_s):
            return await self.process.wait()


Launch = Callable[..., Awaitable[Running]]


@pytest.fixture
async def launch() -> AsyncIterator[Launch]:
    processes: list[asyncio.subprocess.Process] = []

    async def start(*arguments: str, wait_ready: bool = True) -> Running:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "actor",
            *arguments,
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        processes.append(process)
        if not wait_ready:
            return Running(process)
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 20)).decode()
        assert " ready on " in line, (line, await process.communicate())
        return Running(process, line.split(" ready on ")[1].split(": ")[0])

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def png(seed: int = 0, size: int = 8, image_format: str = "PNG") -> bytes:
    """A small image that is another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()
