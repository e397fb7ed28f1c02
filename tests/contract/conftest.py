"""Actors with the fake engine on real sockets: in the test's own event loop, or as a process of their own."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from actor.config import ActorConfig
from actor.engine_fake.engine import FakeEngine
from actor.server import ActorServer
from common.pb.admin.v1.admin_pb2_grpc import AdminServiceStub
from common.pb.rollout.v1.rollout_pb2_grpc import RolloutServiceStub
from common.pb.weights.v1.weights_pb2_grpc import WeightServiceStub
from common.rpc.channel import open_channel
from tests.helpers.fake_actors import FakeActor, Launch, Running, StartActor
from tests.helpers.launched import ROOT


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
