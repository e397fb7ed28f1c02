"""Actors as processes of their own, with the fake engine, for tests that stop, kill and restart them."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

from common.rpc.server import reserve_port
from tests.helpers.launched import ROOT


async def start_actor(address: str, *settings: str) -> asyncio.subprocess.Process:
    """A standalone actor; the caller ends it."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "actor", "--engine", "fake", "--standalone", "--listen", address, *settings),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )


async def end_actor(process: asyncio.subprocess.Process) -> None:
    """At once, also if it is stopped."""
    if process.returncode is None:
        process.kill()
    await process.wait()


@contextlib.asynccontextmanager
async def actor(address: str, *settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A standalone actor for the block."""
    process = await start_actor(address, *settings)
    try:
        yield process
    finally:
        await end_actor(process)


def free_address() -> str:
    """Where nobody listens."""
    with reserve_port("127.0.0.1:0", insecure=False) as reserved:
        return f"127.0.0.1:{reserved.getsockname()[1]}"
