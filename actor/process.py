"""One actor process from start to end: load, serve, leave.

The engine's processes start before the first gRPC object exists; the port is held meanwhile, so that a clash shows at
once and not after the model has loaded.
"""

import asyncio
import secrets
import signal
import socket
from types import FrameType
from typing import NoReturn

import uvloop

from actor.config import ActorConfig, check_model
from actor.engine import Engine, EngineInfo
from actor.engine_thread import EngineThread
from actor.server import ActorServer, model_name
from common import tracing
from common.log import get_logger
from common.process.lifecycle import Shutdown
from common.process.memory import keep_freed
from common.rpc.server import join_address, split_address

log = get_logger(__name__)


class ActorProcess:
    """Owns the process: its signals, its engine and its server. Call `run` once."""

    def __init__(self, config: ActorConfig, reserved: socket.socket) -> None:
        """`reserved` holds the port, see `common.rpc.server.reserve_port`."""
        self.actor_id = secrets.token_hex(6)
        self.config = config
        self._shutdown = Shutdown()
        self._reserved = reserved
        host, _ = split_address(config.listen)
        self.address = join_address(host, reserved.getsockname()[1])

    def run(self) -> int:
        """Serve until a signal, the idle limit or the engine's death; the exit code."""
        # Loading blocks for a minute: the loop's own signal handlers would wait for it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop_loading)
        keep_freed()
        log.info("loading", engine=self.config.engine)
        try:
            return uvloop.run(self._run(self._loaded_engine()))
        finally:
            self._reserved.close()
            log.info("stopped")

    def _loaded_engine(self) -> Engine:
        if self.config.engine == "fake":
            from actor.engine_fake.engine import FakeEngine

            return FakeEngine(self.config.fake, self.actor_id)
        from actor.engine_vllm.engine import VllmEngine  # seconds to import

        engine = VllmEngine(
            check_model(self.config.model),
            self.config.vllm,
            self.actor_id,
            takes_updates=not self.config.standalone,
        )
        engine.load_model()
        return EngineThread(engine)

    async def _run(self, engine: Engine) -> int:
        try:
            info = await engine.start()
            self._shutdown.install()
            return await self._serve(engine, info)
        finally:
            await engine.stop()

    async def _serve(self, engine: Engine, info: EngineInfo) -> int:
        stop_tracing = tracing.start("outrider-actor") if self.config.tracing else None
        server = ActorServer(engine, info, self.config, self.actor_id)
        self._reserved.close()
        await server.start(self.address)
        watches = [asyncio.create_task(self._watch_failure(server)), asyncio.create_task(self._watch_idle(server))]
        state = server.policy.state.value
        print(f"actor {self.actor_id} ready on {self.address}: {model_name(self.config)}, {state}", flush=True)
        await self._shutdown.requested.wait()
        for watch in watches:
            watch.cancel()
        log.info("stopping", reason=self._shutdown.reason, grace_s=self.config.grace_s)
        await server.stop(self.config.grace_s, self._shutdown.forced)
        if stop_tracing is not None:
            await asyncio.to_thread(stop_tracing)
        return 1 if server.failed.is_set() else 0

    async def _watch_failure(self, server: ActorServer) -> None:
        await server.failed.wait()
        self._shutdown.request("the engine has failed")

    async def _watch_idle(self, server: ActorServer) -> None:
        limit_s = self.config.idle_exit_s
        if not limit_s:
            return
        while (left_s := limit_s - server.rpc.activity.idle_s) > 0:  # noqa: ASYNC110 - time passing is no event
            await asyncio.sleep(left_s)
        self._shutdown.request(f"no call for {limit_s:g} s")


def _stop_loading(_number: int, _frame: FrameType | None) -> NoReturn:
    """Not KeyboardInterrupt: vLLM swallows that one while it waits for its processes, and then waits for ever."""
    raise SystemExit(0)
