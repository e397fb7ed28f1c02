"""Keeps the fleet at the newest policy, beside the trainer.

| it wakes when | it then |
|---|---|
| the trainer hands over a snapshot | stages and commits it on all members of the epoch |
| an actor joins, leaves or restarts | ends the epoch, opens the next one with who is there, catches newcomers up |
| an update is due in an epoch that was idle for two minutes | ends the epoch, and opens the next one for it |
| an epoch fails | aborts it, says so, reports who is at fault to the fleet, opens the next one with the others |
| an actor was too slow for an update | leaves it at its version for a while, longer each time |
| an actor cannot take the LoRA adapter | sends the model with the adapter merged into it, to all, from then on |
| epochs fail, and nothing else, for ten minutes with actors there, or until all are lost ten times | ends the run |

The trainer never waits for it, and an actor that it cannot bring to a version gets no prompts of that version: the
fleet knows an actor's version only through `mark_committed`.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable

from common import tracing
from common.log import get_logger
from common.process.threads import to_own_thread
from common.types import ActorState, EpochSpec
from learner.rollouts.fleet import Fleet
from learner.rollouts.members import FleetEvent, Member
from learner.stopping import RunFailed
from learner.weights.adapter_forms import AdapterForms
from learner.weights.buckets import NotFilled, Update
from learner.weights.deltas import Deltas
from learner.weights.epoch import (
    GATHER_SHARE,
    LATE,
    CommitFailed,
    Epoch,
    EpochFailed,
    TooSlow,
    UpdateTimes,
    num_workers,
    open_epoch,
)
from learner.weights.snapshot import Snapshot
from learner.weights.transport import TorchTransport, Transport

log = get_logger(__name__)

_UPDATABLE = (ActorState.PENDING_WEIGHTS, ActorState.SERVING, ActorState.PAUSED)
_RETRY_S = 0.2
# An actor that was too slow for an update has cost all others the whole deadline: the next try is so many deadlines
# later, then twice as many, and so on.
_REST_DEADLINES = 4.0
_LONGEST_REST_S = 600.0
# Without a single update that succeeded, while some were tried.
_GIVE_UP_S = 600.0
# Likewise: actors that die of each update are there for some seconds, and load for many minutes.
_MOST_LOSSES = 10
# Firewalls and NAT forget connections on which nothing moves, often after four minutes, and tell neither end: after a
# long step it is quicker to meet again than to find that out.
_LONGEST_IDLE_S = 120.0


class UpdatesFailed(RunFailed):
    """No actor can be brought to a new version."""


class Publisher:
    """Belongs to the event loop of rank 0; `submit` may be called from any thread."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        run_id: str,
        host: str,
        backend: str | None,
        timeout_s: float,
        merge_adapter: bool = False,
        delta: bool = False,
        notify: Callable[[str], None] = lambda _line: None,
        notify_merged: Callable[[str], None] = lambda _line: None,
        on_update: Callable[[UpdateTimes], None] = lambda _times: None,
        transport: Transport | None = None,
    ) -> None:
        """Make it; `run` does the work.

        Args:
            fleet: whose live members are kept current.
            run_id: of this learner incarnation.
            host: address of this process, as the actors reach it.
            backend: "gloo" or "nccl"; None: "nccl", but for epochs in which it would work beside vLLM's own.
            timeout_s: bound on the rendezvous, and on each stage.
            merge_adapter: send no LoRA adapter, but the model with it.
            delta: send only what changed where that is faster.
            notify: called with one line for each update that fails.
            notify_merged: called with one line where an adapter is merged because an actor does not take it.
            on_update: called after each update that is through.
            transport: carries the weights; torch.distributed by default.
        """
        self._fleet = fleet
        self._run_id = run_id
        self._host = host
        self._backend = backend
        self._timeout_s = timeout_s
        self._forms = AdapterForms(always_merged=merge_adapter, notify=notify_merged)
        self._deltas = Deltas(enabled=delta)
        self._notify = notify
        self._on_update = on_update
        self._loop = asyncio.get_running_loop()
        self._transport = transport or TorchTransport(host)
        self._snapshot: Snapshot | None = None
        self._gathering: asyncio.Task[None] | None = None
        self._gather_s = math.inf  # how long the last one took; the first update waits for it
        self._epoch: Epoch | None = None
        self._epoch_used_at = 0.0
        self._last_epoch = 0
        self._rests: dict[str, tuple[int, float]] = {}  # actor id -> times that it was too slow, when it may try again
        self._num_failures = 0  # in a row
        self._failing_since = 0.0
        self._nobody_since: float | None = None
        self._num_losses = 0  # of all actors
        self._wake = asyncio.Event()
        fleet.subscribe(self._on_fleet_event)

    def submit(self, snapshot: Snapshot) -> None:
        """A newer version to publish, which may still be filled; one that has not been sent by then is skipped."""
        self._loop.call_soon_threadsafe(self._take, snapshot)

    def _take(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._gathering = self._loop.create_task(self._watch_gather(snapshot))
        self._wake.set()

    async def _watch_gather(self, snapshot: Snapshot) -> None:
        started_at = self._loop.time()
        try:
            await snapshot.gathered()
        except NotFilled:  # the trainer has failed, and says why
            if self._snapshot is snapshot:
                self._snapshot = None
        else:
            self._gather_s = self._loop.time() - started_at

    def _on_fleet_event(self, event: FleetEvent) -> None:
        # Actors that are gone fail at nothing.
        now = self._loop.time()
        if not self._fleet.live():
            if self._nobody_since is None:
                self._nobody_since = now
                self._num_losses += 1
        elif self._nobody_since is not None:
            self._failing_since += now - self._nobody_since
            self._nobody_since = None
        self._wake.set()

    async def run(self) -> None:
        """Publish until cancelled. Raises UpdatesFailed when that has been in vain for too long."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                try:
                    await self._bring_up_to_date()
                except EpochFailed as failure:
                    await self._end_epoch(failure)
                except NotFilled:
                    continue  # `_watch_gather` is about to see it too
        finally:
            if self._gathering is not None:
                self._gathering.cancel()
            if self._epoch is not None:
                with contextlib.suppress(asyncio.CancelledError):
                    await self._epoch.abort()

    async def _bring_up_to_date(self) -> None:
        snapshot = self._snapshot
        members = self._updatable()
        if snapshot is None or not members:
            return
        if self._is_epoch_over(members, snapshot):
            await self._open(members)
        assert self._epoch is not None
        if all(member.version >= snapshot.version for member in members):
            self._num_failures = 0  # of others, which are held or rest: this fleet is well
            return
        merged = self._forms.choose(snapshot, members)
        full = any(member.version < 0 for member in members) or self._forms.changes(snapshot, members, merged=merged)

        def committed(member: Member) -> None:
            self._num_failures = 0
            self._rests.pop(member.actor_id, None)
            self._forms.committed(member, merged=merged)
            self._fleet.mark_committed(member.address, member.actor_id, snapshot.version)

        def published(times: UpdateTimes) -> None:
            self._on_update(times)
            log.info(
                "published",
                version=snapshot.version,
                num_actors=sum(member.version == snapshot.version for member in members),
                full=full,
                delta=changes is not None,
                num_bytes=times.num_bytes,
                stage_s=round(times.stage_s, 4),
                pause_s=round(times.pause_s, 4),
            )

        with tracing.span("learner.weight_update", policy_version=snapshot.version, num_actors=len(members)):
            if merged or self._deltas.enabled or self._gather_s > GATHER_SHARE * self._timeout_s:
                assert self._gathering is not None
                await asyncio.wait([self._gathering])
                if self._snapshot is None:
                    return
            changes = None if full else await self._deltas.choose(snapshot, members)
            update = changes or await self._whole(snapshot, full=full, merged=merged)
            try:
                times = await self._epoch.send(update, committed)
            except CommitFailed as failure:
                if failure.times is not None:
                    published(failure.times)
                raise
        self._epoch_used_at = self._loop.time()
        self._deltas.sent(snapshot, members, times)
        published(times)

    def _is_epoch_over(self, members: tuple[Member, ...], snapshot: Snapshot) -> bool:
        """Whether an update needs another one. Who is only held comes back, or is left out of the next update."""
        if self._epoch is None or any(member.left.is_set() for member in self._epoch.members):
            return True
        is_behind = any(member.version < snapshot.version for member in members)
        is_idle = self._loop.time() - self._epoch_used_at > _LONGEST_IDLE_S
        return is_behind and (is_idle or set(self._epoch.members) != set(members))

    async def _open(self, members: tuple[Member, ...]) -> None:
        if self._epoch is not None:
            await self._epoch.abort()
            self._epoch = None
        self._last_epoch += 1
        spec = EpochSpec(
            run_id=self._run_id,
            epoch=self._last_epoch,
            master_host=self._host,
            master_port=self._transport.port,
            world_size=1 + sum(num_workers(member) for member in members),
            rank=0,
            backend=self._backend or ("gloo" if any(num_workers(member) > 1 for member in members) else "nccl"),
            timeout_s=self._timeout_s,
        )
        self._epoch = await open_epoch(spec, members, self._transport)
        self._epoch_used_at = self._loop.time()
        log.info("epoch open", epoch=spec.epoch, actors=[member.address for member in members])

    async def _whole(self, snapshot: Snapshot, *, full: bool, merged: bool) -> Update:
        """The update that is no delta."""
        if merged:
            return await to_own_thread("merge-weights", snapshot.update, full=full, merged=True)
        return snapshot.update(full=full, keep=self._deltas.enabled)

    async def _end_epoch(self, failure: EpochFailed) -> None:
        log.warning("epoch failed", epoch=self._last_epoch, reason=str(failure))
        self._notify(f"weight update failed: {failure}")
        if not self._num_failures:
            self._failing_since, self._num_losses = self._loop.time(), 0
        self._num_failures += 1
        failing_s = self._loop.time() - self._failing_since
        if failing_s > _GIVE_UP_S or self._num_losses >= _MOST_LOSSES:
            losses = f", and all actors were gone {self._num_losses} times" if self._num_losses else ""
            raise UpdatesFailed(
                f"no weight update has succeeded in {failing_s:.0f} s and {self._num_failures} tries{losses}; "
                f"the last: {failure}"
            )
        self._deltas.failed()
        if self._gathering is not None and not self._gathering.done():
            self._gather_s = math.inf  # there will be time enough for the next try when it is done
        if self._epoch is not None:
            await self._epoch.abort()
            self._epoch = None
        for member, error in failure.culprits:
            if isinstance(failure, CommitFailed):
                self._forms.unknown(member)
            if isinstance(failure, TooSlow) or (isinstance(failure, CommitFailed) and isinstance(error, LATE)):
                self._rest(member)
            if not self._forms.is_refusal(error) and not self._deltas.is_refusal(error):
                self._fleet.report_failure(member, error)
        await asyncio.sleep(_RETRY_S)  # the fleet looks again at who is there; a refusal must not become a busy loop
        self._wake.set()

    def _rest(self, member: Member) -> None:
        num_times, _ = self._rests.get(member.actor_id, (0, 0.0))
        rest_s = min(_REST_DEADLINES * self._timeout_s * 2**num_times, _LONGEST_REST_S)
        self._rests[member.actor_id] = (num_times + 1, self._loop.time() + rest_s)
        self._loop.call_later(rest_s, self._wake.set)
        log.warning("too slow for an update", address=member.address, rest_s=rest_s)

    def _updatable(self) -> tuple[Member, ...]:
        """Those that an epoch is for; who was too slow rests, unless there is nobody else."""
        willing = [member for member in self._fleet.live() if member.state in _UPDATABLE and not member.held]
        now = self._loop.time()
        rested = [member for member in willing if self._rests.get(member.actor_id, (0, 0.0))[1] <= now]
        return tuple(rested or willing)
