"""Weights of a running vLLM engine: staged beside generation by its workers, made live while that stands still."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from actor.weights.adapters import Adapters
from common.errors import (
    InvalidRequest,
    NotStaged,
    OutriderError,
    RendezvousUnreachable,
    StageBlocked,
    StageCorrupt,
    StageTimeout,
    TooLarge,
)
from common.types import EpochSpec, Manifest

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

# Each look at the workers is a call between two steps of theirs: they come after a fiftieth of the time so far.
_MIN_POLL_S, _MAX_POLL_S = 0.01, 0.1
# What torch and Python raise where memory is short: another try changes nothing, and it is nobody else's fault.
_NO_MEMORY = ("OutOfMemoryError", MemoryError.__name__)


class VllmUpdates:
    """The half of `Engine` that has to do with weights. `engine` gives the running one, or raises EngineDead."""

    def __init__(self, engine: "Callable[[], AsyncLLM]", adapters: Adapters) -> None:
        self._engine = engine
        self._adapters = adapters
        self._staged: Manifest | None = None
        self._paused = False
        self._standing = asyncio.Lock()  # held by whoever lets generation stand still or go on

    async def take_adapters(self) -> None:
        """From now on adapters come this way."""
        await self._on_workers("take_adapters")

    async def open_epoch(self, spec: EpochSpec) -> None:
        """See `Engine.open_epoch`."""
        await self._on_workers("join_epoch", asdict(spec))
        await self._finish_job(spec.timeout_s)

    async def stage(self, manifest: Manifest, timeout_s: float) -> tuple[int, ...]:
        """See `Engine.stage`."""
        self._staged = None
        self._adapters.check(manifest)
        await self._on_workers("stage_weights", asdict(manifest))
        results = await self._finish_job(timeout_s)
        if any(tuple(result) != tuple(results[0]) for result in results):
            raise RuntimeError("workers received different bytes")
        self._staged = manifest
        return tuple(results[0])

    async def commit(self, policy_version: int) -> float:
        """See `Engine.commit`. Requests in flight are kept and go on under the new weights."""
        engine, manifest = self._engine(), self._staged
        if manifest is None or manifest.policy_version != policy_version:
            raise NotStaged(f"version {policy_version} is not staged")
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._staged = None
        async with self._standing:
            started_at = time.monotonic()
            if not self._paused:
                await self._stand_still()
            await engine.start_weight_update()
            await engine.update_weights(WeightTransferUpdateRequest({"policy_version": policy_version}))
            await engine.finish_weight_update(weight_version=str(policy_version))
            # Keys and values of requests in flight were computed by the old weights: they are computed again.
            if not await engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
                raise RuntimeError("caches of the engine still hold keys and values of the old weights")
            if manifest.updates_vision:
                await engine.reset_encoder_cache()
            self._adapters.commit(manifest)
            if not self._paused:
                await engine.resume_generation()
            return time.monotonic() - started_at

    async def pause(self) -> None:
        """See `Engine.pause`."""
        async with self._standing:
            await self._stand_still()
            self._paused = True

    async def resume(self) -> None:
        """See `Engine.resume`."""
        async with self._standing:
            await self._engine().resume_generation()
            self._paused = False

    async def _stand_still(self) -> None:
        # Not AsyncLLM.pause_generation: that sleeps for 20 ms so as to order events for its caller.
        await self._engine().engine_core.pause_scheduler_async(mode="keep", clear_cache=False)

    async def abort_epoch(self) -> None:
        """See `Engine.abort_epoch`."""
        self._staged = None
        await self._on_workers("leave_epoch")

    async def _finish_job(self, timeout_s: float) -> list[Any]:
        """Wait for the workers' background job; its result on each worker."""
        started_at = time.monotonic()
        while True:
            reports = await self._on_workers("job_result")
            # Workers are neighbours in the chain: the last one passes on to another actor.
            late = StageBlocked if reports[-1].get("blocked") else StageTimeout
            for report in reports:
                if report["done"] and report["error"] is not None:
                    raise _job_error(report["kind"], report["error"], report["field"], late)
            if all(report["done"] for report in reports):
                return [report["result"] for report in reports]
            elapsed_s = time.monotonic() - started_at
            if elapsed_s > timeout_s:
                raise late(f"the workers were not done within {timeout_s:.1f} s")
            await asyncio.sleep(min(max(_MIN_POLL_S, elapsed_s / 50), _MAX_POLL_S))

    async def _on_workers(self, method: str, *arguments: Any) -> list[Any]:
        result: list[Any] = await self._engine().collective_rpc(method, args=arguments)
        return result


def _job_error(kind: str, error: str, field: str | None, late: type[StageTimeout]) -> OutriderError:
    """What the error of a worker's background job is here."""
    if field is not None:
        return InvalidRequest(field, error)
    if kind == ValueError.__name__:  # no layer can be made of what came, and the next try would bring the same
        return InvalidRequest("manifest.parameters", error)
    for named in (StageCorrupt, RendezvousUnreachable):
        if kind == named.__name__:
            return named(error)
    if kind in _NO_MEMORY or "out of memory" in error:  # NCCL says it in an error of another kind
        return TooLarge("", f"a worker has no memory for its part: {kind}: {error}")
    return late(f"a worker could not finish its part: {kind}: {error}")
