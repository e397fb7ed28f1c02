"""Actors of `fan_in`: several servers in one process, each with an engine, a port and an identity of its own.

`python -m benchmarks.fan_in_side NUM SETTINGS`, the section `fake` as JSON; speaks as `benchmarks.side.Process` wants.
"""

import asyncio
import json
import secrets
import sys

import uvloop

import actor.weights.transfer  # noqa: F401 - torch: now, and not in all processes at once when the first weights come
from actor.config import ActorConfig
from actor.engine_fake.engine import FakeEngine
from actor.server import ActorServer
from common.log import configure


async def _serve(num_servers: int, config: ActorConfig) -> None:
    servers, addresses = [], []
    for _ in range(num_servers):
        actor_id = secrets.token_hex(6)
        engine = FakeEngine(config.fake, actor_id)
        servers.append(ActorServer(engine, await engine.start(), config, actor_id))
        addresses.append(f"127.0.0.1:{await servers[-1].start('127.0.0.1:0')}")
    print(json.dumps({"ready": {"addresses": addresses}}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await asyncio.gather(*(server.stop(0.0) for server in servers))


if __name__ == "__main__":
    configure("warning")
    settings = {"engine": "fake", "fake": json.loads(sys.argv[2])}
    uvloop.run(_serve(int(sys.argv[1]), ActorConfig.model_validate(settings)))
