"""Weights of the fake engine: really received, over a real process group, and thrown away at the commit."""

import asyncio
import bisect
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from actor.config import FakeConfig
from actor.weights.adapters import Adapters
from common.errors import NotStaged, StageBlocked, StageTimeout
from common.types import EpochSpec, Manifest, VersionSpan

if TYPE_CHECKING:
    from actor.weights.transfer import WeightReceiver


class FakeUpdates:
    """The half of `Engine` that has to do with weights, and which version was live when."""

    def __init__(self, config: FakeConfig, adapters: Adapters) -> None:
        self._config = config
        self._adapters = adapters
        self._receivers: list[WeightReceiver] = []
        self._staged: Manifest | None = None
        # When each version went live, ascending, on the monotonic clock.
        self._commit_times: list[float] = [0.0]
        self._versions: list[int] = [0]

    def spans(self, start_s: float, num_tokens: int) -> tuple[VersionSpan, ...]:
        """Token t was sampled at `start_s + t * token_s`, by the version that was live then."""
        times = start_s + self._config.token_s * np.arange(num_tokens)
        lives = [bisect.bisect_right(self._commit_times, moment) - 1 for moment in times]
        edges = [0, *(t for t in range(1, num_tokens) if lives[t] != lives[t - 1]), num_tokens]
        return tuple(VersionSpan(self._versions[lives[start]], start, end) for start, end in itertools.pairwise(edges))

    async def open_epoch(self, spec: EpochSpec) -> None:
        """See `Engine.open_epoch`."""
        transfer = await asyncio.to_thread(_import_transfer)
        self.leave()
        self._receivers = [transfer.WeightReceiver() for _ in range(self._config.num_workers)]
        jobs = [receiver.join(spec, spec.rank + i) for i, receiver in enumerate(self._receivers)]
        await _finish(jobs, spec.timeout_s)

    async def stage(self, manifest: Manifest, timeout_s: float) -> tuple[int, ...]:
        """See `Engine.stage`."""
        self._staged = None
        self._adapters.check(manifest)
        results: list[tuple[int, ...]] = await _finish(
            [receiver.receive(manifest, _Discard()) for receiver in self._receivers], timeout_s, self._stage_error
        )
        if any(result != results[0] for result in results):
            raise RuntimeError("workers received different bytes")
        self._staged = manifest
        return results[0]

    def _stage_error(self) -> type[StageTimeout]:
        return StageBlocked if self._receivers and self._receivers[-1].is_blocked else StageTimeout

    async def commit(self, policy_version: int) -> float:
        """See `Engine.commit`."""
        if self._staged is None or self._staged.policy_version != policy_version:
            raise NotStaged(f"version {policy_version} is not staged")
        await asyncio.sleep(self._config.commit_s)
        for receiver in self._receivers:
            receiver.take(policy_version, _Discard)
        self._adapters.commit(self._staged)
        self._staged = None
        self._commit_times.append(time.monotonic())
        self._versions.append(policy_version)
        return self._config.commit_s

    def leave(self) -> None:
        """Drop what is staged and leave the group."""
        self._staged = None
        receivers, self._receivers = self._receivers, []
        for receiver in receivers:
            receiver.leave()


def _import_transfer() -> ModuleType:
    """It takes torch along: seconds, in which others are answered. Most tests need none of it."""
    from actor.weights import transfer

    return transfer


class _Discard:
    """Receives weights for nothing."""

    def add(self, tensors: object) -> None:
        """See `Staging.add`."""

    def finish(self) -> None:
        """See `Staging.finish`."""

    def discard(self) -> None:
        """See `Staging.discard`."""


async def _finish(
    jobs: "list[Future[Any]]", timeout_s: float, late: Callable[[], type[StageTimeout]] = lambda: StageTimeout
) -> list[Any]:
    """Results of background jobs; a job that fails, as one whose peers are gone, is late."""
    try:
        return await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, jobs)), timeout_s)
    except TimeoutError:
        raise late()(f"the workers were not done within {timeout_s:.1f} s") from None
    except RuntimeError as error:
        raise late()(f"a worker could not finish its part: {error}") from error
