"""Which policy this actor serves, and how it changes: the state machine behind `weights.v1`.

    LOADING --> PENDING_WEIGHTS --first commit of a run--> SERVING --> DRAINING
       |                                                    ^   |
       +------------- standalone: version 0 ----------------+   +--> FAILED (a commit broke, or the engine died)

SERVING shows as PAUSED while an operator's pause lasts (`actor.pause`).

An epoch is opened, then each version is staged and committed in it. One operation runs at a time. Abort, and OpenEpoch
of a later epoch or another run, interrupt OpenEpoch and Stage; nothing interrupts Commit, also not the caller's
leaving. A stage that fails ends its epoch here and changes neither state nor version.

A new run takes the actor over. Versions of the old run say nothing about the new one's policy, so the actor is
PENDING_WEIGHTS until the new run's first commit.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from actor.engine import Engine
from actor.pause import Pause
from common.errors import (
    Draining,
    EngineDead,
    InvalidRequest,
    NotStaged,
    StageCorrupt,
    StageTimeout,
    StaleEpoch,
    WeightsPending,
)
from common.log import get_logger
from common.types import ActorState, EpochSpec, Manifest

log = get_logger(__name__)

_RUNS_REMEMBERED = 64
# The engine has this much longer than the caller said: by its own deadline it can say more of what it waits for.
_SLACK_S = 0.5

T = TypeVar("T")


class PolicyState:
    """The state of one actor. All methods belong to one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._state = ActorState.LOADING
        self._pause = Pause(engine, self._changed)
        self.policy_version = 0
        self.run_id = ""
        self.epoch = 0
        self.staged_version = -1
        self.on_change: Callable[[], None] = lambda: None
        self.on_pause: Callable[[float], None] = lambda _pause_s: None
        self._joined = False
        self._retired_runs: deque[str] = deque(maxlen=_RUNS_REMEMBERED)
        self._lock = asyncio.Lock()
        self._running: asyncio.Task[Any] | None = None  # what may be interrupted
        # The last one asked for, also when it is done; None once something else has been staged.
        self._commit: tuple[tuple[str, int, int], asyncio.Task[float]] | None = None

    # ------------------------------------------------------------------------------------------------ life

    @property
    def state(self) -> ActorState:
        """What the actor is now."""
        paused = self._pause.active and self._state is ActorState.SERVING
        return ActorState.PAUSED if paused else self._state

    def loaded(self, *, standalone: bool) -> None:
        """The engine is ready."""
        self._become(ActorState.SERVING if standalone else ActorState.PENDING_WEIGHTS)

    def drain(self) -> None:
        """Take nothing new from now on."""
        if self.state is not ActorState.FAILED:
            self._become(ActorState.DRAINING)

    def fail(self) -> None:
        """The engine is dead, or what it serves is no known policy. What stands still does so for good."""
        self._pause.stay()
        self._become(ActorState.FAILED)

    def _become(self, state: ActorState) -> None:
        if state is not self._state:
            log.info("state", state=state.value, policy_version=self.policy_version)
            self._state = state
            self._changed()

    def _changed(self) -> None:
        self.on_change()

    async def pause(self, timeout_s: float) -> None:
        """Let generation stand still, for `timeout_s` at most. Raises Draining or EngineDead."""
        self._refuse_if_leaving()
        await self._pause.begin(timeout_s)

    async def resume(self) -> None:
        """Let it go on. Raises EngineDead."""
        self._refuse_if_failed()
        await self._pause.end()

    def refuse_unless_of(self, run_id: str) -> None:
        """For requests that name a run. Raises WeightsPending if this actor follows another one."""
        if run_id and run_id != self.run_id:
            raise WeightsPending(f"this actor follows run {self.run_id or 'none'}, not run {run_id}")

    # ------------------------------------------------------------------------------------------------ operations

    async def open_epoch(self, spec: EpochSpec) -> None:
        """Join a broadcast group. Raises StaleEpoch, StageTimeout, RendezvousUnreachable, Draining or EngineDead."""
        self._refuse_if_leaving()
        if spec.run_id in self._retired_runs:
            raise StaleEpoch(f"run {spec.run_id} has been replaced by run {self.run_id}")
        if spec.run_id == self.run_id and spec.epoch <= self.epoch:
            raise StaleEpoch(f"epoch {spec.epoch} is not after epoch {self.epoch}")
        if spec.run_id != self.run_id:
            if self.run_id:
                self._retired_runs.append(self.run_id)
            log.info("following a new run", run_id=spec.run_id, old_run_id=self.run_id)
            self._become(ActorState.PENDING_WEIGHTS)
        # From here on the old epoch is history, whatever becomes of the new one.
        self.run_id, self.epoch = spec.run_id, spec.epoch
        self._interrupt()
        async with self._lock:
            self._fence(spec.run_id, spec.epoch)
            await self._leave()
            await self._interruptible(self._engine.open_epoch(spec), spec.timeout_s)
            self._joined = True
            log.info("joined an epoch", epoch=spec.epoch, world_size=spec.world_size)

    async def stage(
        self, run_id: str, epoch: int, manifest: Manifest, timeout_s: float
    ) -> tuple[tuple[int, ...], float]:
        """Receive one version; the checksum of each bucket, and the seconds that it took.

        Raises StaleEpoch, InvalidRequest (a version before the one served), StageTimeout, StageCorrupt, Draining or
        EngineDead.
        """
        started_s = time.monotonic()
        async with self._lock:
            self._fence(run_id, epoch)
            self._refuse_if_leaving()
            if not self._joined:
                raise StaleEpoch(f"epoch {epoch} is not open here; open the next one")
            version = manifest.policy_version
            if self._state is ActorState.SERVING and version < self.policy_version:
                raise InvalidRequest(
                    "manifest.policy_version", f"is {version}; {self.policy_version} is served already"
                )
            self.staged_version = -1
            self._commit = None
            checksums = await self._interruptible(self._engine.stage(manifest, timeout_s), timeout_s)
            wrong = manifest.wrong_buckets(checksums)
            if wrong:
                await self._leave()
                raise StageCorrupt(f"version {version}: the checksum of bucket(s) {wrong} is not the manifest's")
            self.staged_version = version
            return checksums, time.monotonic() - started_s

    async def commit(self, run_id: str, epoch: int, policy_version: int, timeout_s: float) -> float:
        """Make the staged version live; seconds that generation stood still.

        Idempotent: a second call for what was staged once waits for the first, and answers as it did. Raises
        StaleEpoch, NotStaged, StageTimeout (the commit itself goes on), Draining or EngineDead.
        """
        self._fence(run_id, epoch)
        key = (run_id, epoch, policy_version)
        if self._commit is None or self._commit[0] != key or _has_failed(self._commit[1]):
            task = asyncio.create_task(self._do_commit(*key))
            task.add_done_callback(_look_at)
            self._commit = (key, task)
        try:
            return await asyncio.wait_for(asyncio.shield(self._commit[1]), timeout_s)
        except TimeoutError:
            raise StageTimeout(f"version {policy_version} was not live within {timeout_s:.1f} s") from None

    async def abort(self, run_id: str, epoch: int) -> None:
        """Drop what is staged and leave the epoch; fine if there is nothing to leave. Raises StaleEpoch."""
        if not self.run_id:
            return
        self._fence(run_id, epoch)
        self._interrupt()
        async with self._lock:
            if (run_id, epoch) == (self.run_id, self.epoch):
                await self._leave()

    # ------------------------------------------------------------------------------------------------ parts

    async def _do_commit(self, run_id: str, epoch: int, policy_version: int) -> float:
        async with self._lock:
            self._fence(run_id, epoch)
            self._refuse_if_leaving()
            if self.staged_version != policy_version:
                staged = f"version {self.staged_version}" if self.staged_version >= 0 else "nothing"
                raise NotStaged(f"version {policy_version} cannot be committed: {staged} is staged")
            self.staged_version = -1
            try:
                pause_s = await self._engine.commit(policy_version)
            except Exception:
                # Half of the weights may be new: nobody may be told that this is a policy.
                self.fail()
                raise
            self.on_pause(pause_s)
            self.policy_version = policy_version
            self._fence_run(run_id)  # a new one may have come meanwhile: it must not be served these
            log.info("serving", policy_version=policy_version, pause_s=round(pause_s, 4))
            if self.state is ActorState.PENDING_WEIGHTS:
                self._become(ActorState.SERVING)
            return pause_s

    async def _interruptible(self, operation: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run one operation of the engine; whatever ends it early also ends the epoch here."""
        self._running = task = asyncio.ensure_future(operation)
        task.add_done_callback(_look_at)
        try:
            return await asyncio.wait_for(task, timeout_s + _SLACK_S)
        except TimeoutError:
            await self._leave()
            raise StageTimeout(f"not done within {timeout_s:.1f} s") from None
        except asyncio.CancelledError:
            await self._leave()
            if self._running is None:
                raise StaleEpoch("the epoch was aborted") from None
            raise
        except Exception:
            await self._leave()
            raise
        finally:
            self._running = None

    def _interrupt(self) -> None:
        task, self._running = self._running, None
        if task is not None:
            task.cancel()

    async def _leave(self) -> None:
        self._joined = False
        self.staged_version = -1
        await asyncio.shield(self._engine.abort_epoch())

    def _fence_run(self, run_id: str) -> None:
        if run_id != self.run_id:
            raise StaleEpoch(f"run {run_id} is not the one that this actor follows ({self.run_id or 'none'})")

    def _fence(self, run_id: str, epoch: int) -> None:
        self._fence_run(run_id)
        if epoch != self.epoch:
            raise StaleEpoch(f"epoch {epoch} is not the current one ({self.epoch})")

    def _refuse_if_leaving(self) -> None:
        if self.state is ActorState.DRAINING:
            raise Draining("this actor is draining")
        self._refuse_if_failed()

    def _refuse_if_failed(self) -> None:
        if self.state is ActorState.FAILED:
            raise EngineDead("the engine of this actor has failed")


def _look_at(task: "asyncio.Task[Any]") -> None:
    """Its error counts as seen, also when every caller has left."""
    if not task.cancelled():
        task.exception()


def _has_failed(task: "asyncio.Task[Any]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
