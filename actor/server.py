"""The gRPC server of one actor: both services, health that follows the state, and the drain."""

import asyncio
import contextlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from actor.config import ActorConfig
from actor.engine import Engine, EngineInfo
from actor.media.store import MediaStore
from actor.metrics import ActorMetrics
from actor.services.admin import AdminService
from actor.services.rollout import RolloutService
from actor.services.weights import WeightService
from actor.weights.policy_state import PolicyState
from common.errors import EngineDead
from common.log import get_logger
from common.rpc.server import RpcServer
from common.types import ActorState, ServerInfo

log = get_logger(__name__)

_WATCH_PERIOD_S = 0.5
# An engine that does not even say whether it is well is not.
_WATCH_TIMEOUT_S = 30.0
_ALIVE = frozenset({ActorState.PENDING_WEIGHTS, ActorState.SERVING, ActorState.PAUSED, ActorState.DRAINING})


class ActorServer:
    """Serves a started engine. `failed` is set when the engine, or what it serves, is beyond repair."""

    def __init__(self, engine: Engine, info: EngineInfo, config: ActorConfig, actor_id: str) -> None:
        self.policy = PolicyState(engine)
        self.failed = asyncio.Event()
        self._engine = engine
        self._config = config
        self._changed = asyncio.Event()
        self._watches: list[asyncio.Task[None]] = []
        self.rpc = RpcServer(
            config.limits.max_message_bytes,
            tls=config.tls,
            max_streams_per_peer=config.limits.max_streams_per_peer,
        )
        store = MediaStore(config.limits.media_store_bytes)
        server_info = _server_info(info, config, actor_id)
        self.metrics = ActorMetrics(self.policy, engine)
        self.policy.on_pause = self.metrics.pauses.observe
        self._stop_metrics: Callable[[], None] = lambda: None
        self._rollouts = RolloutService(
            engine,
            self.policy,
            server_info,
            info.vocab_size,
            store,
            self.metrics,
            config.limits.max_held_media_bytes,
        )
        self._weights = WeightService(engine, self.policy, actor_id, info)
        self._admin = AdminService(engine, self.policy)

    async def start(self, address: str) -> int:
        """Open the ports, with the engine ready; the port of gRPC. Raises ConfigError if one is taken."""
        if self._config.metrics_listen is not None:
            port, self._stop_metrics = self.metrics.serve(self._config.metrics_listen)
            log.info("metrics", port=port)
        self.policy.loaded(standalone=self._config.standalone)
        services = [service.add_to(self.rpc.grpc) for service in (self._rollouts, self._weights, self._admin)]
        port = await self.rpc.start(address, services)
        if self._config.health_listen is not None:
            log.info("health", port=await self.rpc.start_probes(self._config.health_listen))
        self._report_health()
        self.policy.on_change = self._changed.set
        watches = [self._follow_state(), self._watch_engine()]
        if self._config.metrics_listen is not None:
            watches.append(self.metrics.stalls.run())
        self._watches = [asyncio.create_task(watch) for watch in watches]
        return port

    async def stop(self, grace_s: float, forced: asyncio.Event | None = None) -> None:
        """Readiness off, then let running groups finish for at most `grace_s` (or until `forced`), then close the port.

        What still runs then is cancelled; its client sees a broken call and asks another actor.
        """
        self.policy.drain()
        self._report_health()
        resuming = asyncio.create_task(self._resume())
        finished = asyncio.create_task(self._rollouts.idle.wait())
        insisted = asyncio.create_task((forced or asyncio.Event()).wait())
        limit_s = 0.0 if self.failed.is_set() else grace_s
        await asyncio.wait([finished, insisted], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        for task in (finished, insisted, resuming, *self._watches):
            task.cancel()
        # A moment for the last message of a group that has just finished.
        await self.rpc.stop(0.1 if self._rollouts.idle.is_set() else 0.0)
        await asyncio.to_thread(self._stop_metrics)

    async def _resume(self) -> None:
        """An operator's pause, if there is one, is over."""
        with contextlib.suppress(EngineDead):
            await self.policy.resume()

    def _report_health(self) -> None:
        state = self.policy.state
        self.rpc.set_health(liveness=state in _ALIVE, readiness=state is ActorState.SERVING)

    async def _follow_state(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._report_health()
            if self.policy.state is ActorState.FAILED:
                self.failed.set()

    async def _watch_engine(self) -> None:
        while self.policy.state is not ActorState.FAILED:
            await asyncio.sleep(_WATCH_PERIOD_S)
            try:
                async with asyncio.timeout(_WATCH_TIMEOUT_S):
                    await self._engine.check()
            except (EngineDead, TimeoutError) as error:
                log.error("the engine is dead", error=str(error) or f"no answer in {_WATCH_TIMEOUT_S:g} s")
                self.policy.fail()


def model_name(config: ActorConfig) -> str:
    """What clients see as the model: the name of its directory."""
    return (config.model or Path("fake")).resolve().name


def _server_info(info: EngineInfo, config: ActorConfig, actor_id: str) -> ServerInfo:
    version = "unknown"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("outrider")
    return ServerInfo(
        actor_id=actor_id,
        model=model_name(config),
        architecture=info.architecture,
        engine=info.name,
        engine_version=info.version,
        server_version=version,
        policy_version=0,
        limits=config.server_limits(info.max_context_tokens, takes_videos=info.takes_videos),
        suppressed_token_ids=info.suppressed_token_ids,
    )
