"""One weight epoch from the learner's side: a broadcast group with a fixed list of actors, and its three moves.

    open: OpenEpoch to all, join as rank 0 -> stage: Stage to all, broadcast -> commit: Commit to all   ... -> abort

Whatever fails, `open_epoch` and `Epoch.send` say which members are at fault; the publisher then aborts the epoch and
opens the next one with the others.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.errors import (
    DeadlineExceeded,
    OutriderError,
    RendezvousUnreachable,
    StageBlocked,
    StageCorrupt,
    StageTimeout,
    Unreachable,
)
from common.log import get_logger
from common.types import EpochSpec
from learner.rollouts.members import Member
from learner.weights.buckets import Update
from learner.weights.transport import Sender, Transport

log = get_logger(__name__)

# A policy may still be gathered while it goes out, and the clocks of the members run meanwhile. Where that takes more
# than this share of the time that an update has, none of them is at fault for being late.
GATHER_SHARE = 0.25
# Where updates have less: a commit that is given up leaves an actor whose version nobody knows.
_MIN_COMMIT_TIMEOUT_S = 60.0
# One that hangs must not keep the next version from all others until then: so long after the first that served the
# new one, or so many times as long as that took.
_LAST_COMMIT_S = 30.0
_LAST_COMMIT_RATIO = 10.0
# How long to wait behind the first that was late, so that the others, hung and cut-off ones too, can speak as well.
_SPEAK_S = 3.0
# Of a member that is late: it says so itself, or its engine does not even answer the server.
LATE = (StageTimeout, DeadlineExceeded)
# Who never comes in, while all others wait for it.
_ABSENT = (DeadlineExceeded, RendezvousUnreachable)


class EpochFailed(Exception):  # noqa: N818 - says what happened
    """The epoch is over. `culprits` are the members that failed, with what they said; empty: it was our own end."""

    def __init__(self, message: str, culprits: Sequence[tuple[Member, OutriderError]] = ()) -> None:
        super().__init__(message)
        self.culprits = tuple(culprits)


class TooSlow(EpochFailed):
    """The whole time that a rendezvous or an update may take has passed. `culprits` are those that made it so, or one
    that may have, where a rendezvous does not tell.
    """


class CommitFailed(EpochFailed):
    """All had staged the update. Whether the culprits serve it is not known: an answer may have been lost.

    `times` of the others, which serve it; None if there are none.
    """

    def __init__(
        self, message: str, culprits: Sequence[tuple[Member, OutriderError]], times: "UpdateTimes | None"
    ) -> None:
        super().__init__(message, culprits)
        self.times = times


@dataclass(frozen=True, slots=True)
class UpdateTimes:
    """Seconds of one update: until all members had staged it, and the longest pause of generation. Bytes sent."""

    stage_s: float
    pause_s: float
    num_bytes: int = 0


class Epoch:
    """An open epoch; made by `open_epoch`."""

    def __init__(self, spec: EpochSpec, members: tuple[Member, ...], sender: Sender) -> None:
        self.members = members
        self._spec = spec
        self._sender = sender

    async def send(
        self,
        update: Update,
        on_commit: Callable[[Member], None] = lambda _member: None,
    ) -> UpdateTimes:
        """Bring every member to the update's version. Those that serve it already receive it too, as the broadcast
        wants, and go on undisturbed. `on_commit` is called for each of the others as soon as it serves the version,
        whatever becomes of the rest.

        Raises:
            EpochFailed: a member, the broadcast or the gather failed before all were through (`TooSlow`: a member was
                late; `CommitFailed`: after all had staged it). A member is either at the new version or untouched at
                its old one.
        """
        loop = asyncio.get_running_loop()
        run_id, epoch, timeout_s = self._spec.run_id, self._spec.epoch, self._spec.timeout_s
        manifest, checksums = update.manifest, update.checksums
        version = manifest.policy_version
        started_at = loop.time()
        gathered_at = [started_at] if not checksums else []
        for last in checksums[-1:]:  # they are filled in order
            last.add_done_callback(lambda _: gathered_at.append(loop.time()))
        broadcast = asyncio.ensure_future(self._sender.send(update.buffers, checksums))
        stages = [member.client.stage(run_id, epoch, manifest, timeout_s=timeout_s) for member in self.members]
        try:
            received = await _all_or_fail(f"staging version {version}", self.members, stages, broadcast)
        except EpochFailed as failure:
            gather_s = (gathered_at[0] if gathered_at else loop.time()) - started_at
            if not gathered_at or gather_s > GATHER_SHARE * timeout_s:  # who is late has waited for us
                others = [(member, error) for member, error in failure.culprits if not isinstance(error, LATE)]
                raise EpochFailed(f"{failure}; {gather_s:.1f} s went by with the gather", others) from failure
            culprits = at_fault(failure.culprits)
            is_late = loop.time() - started_at >= timeout_s and all(isinstance(error, LATE) for _, error in culprits)
            raise (TooSlow if is_late else EpochFailed)(str(failure), culprits) from failure
        staged_at = loop.time()
        _check(version, self.members, received, tuple(checksum.result() for checksum in checksums))
        behind = [member for member in self.members if member.version < version]
        commit_s = max(timeout_s, _MIN_COMMIT_TIMEOUT_S)
        commits = [member.client.commit(run_id, epoch, version, timeout_s=commit_s) for member in behind]
        pauses, culprits = await _commit_each(behind, commits, on_commit)
        num_bytes = sum(bucket.wire_bytes for bucket in manifest.buckets)
        times = UpdateTimes(staged_at - started_at, max(pauses, default=0.0), num_bytes)
        if culprits:
            raise CommitFailed(
                f"committing version {version} failed: {culprits[0][1]}", culprits, times if pauses else None
            )
        return times

    async def abort(self) -> None:
        """Leave, and tell the members to; those that do not answer are none of our concern any more."""
        self._sender.abort()
        await abort_members(self._spec, self.members)


async def open_epoch(spec: EpochSpec, members: Sequence[Member], transport: Transport) -> Epoch:
    """Open an epoch with `members`, whose workers take the ranks from 1 in this order.

    Raises:
        EpochFailed: a member did not come in (`TooSlow`: it held the others up, which waited for it, or may have).
    """
    joins, rank = [], 1
    for member in members:
        joins.append(_join(member, replace(spec, rank=rank)))
        rank += num_workers(member)
    joined = asyncio.ensure_future(transport.join(spec))
    try:
        await _all_or_fail(f"opening epoch {spec.epoch}", members, joins, joined)
    except BaseException as error:
        joined.add_done_callback(_abort_if_in)
        await abort_members(spec, members)
        if not isinstance(error, EpochFailed):
            raise
        absent = [culprit for culprit in error.culprits if isinstance(culprit[1], _ABSENT)]
        if absent:
            raise TooSlow(str(error), absent) from error
        if error.culprits and all(isinstance(said, StageTimeout) for _, said in error.culprits):
            # A join does not say who waits for whom, and two that cannot connect make all late: each in its turn.
            one = error.culprits[spec.epoch % len(error.culprits)]
            raise TooSlow(f"{error}; who is at fault is not known", [one]) from error
        raise EpochFailed(str(error), at_fault(error.culprits)) from error
    return Epoch(spec, tuple(members), joined.result())


def _check(version: int, members: Sequence[Member], received: Sequence[tuple[int, ...]], sent: tuple[int, ...]) -> None:
    """Members check what the manifest says; what was gathered after it they only tell."""
    torn = [
        (member, StageCorrupt(f"version {version}: {member.address} has not received what was sent"))
        for member, checksums in zip(members, received, strict=True)
        if checksums != sent
    ]
    if torn:
        raise EpochFailed(f"staging version {version} failed: {torn[0][1]}", torn)


async def _join(member: Member, spec: EpochSpec) -> None:
    """Have a member come in. It must be the process that the fleet knows: another one at its address has no weights."""
    await member.client.open_epoch(spec)
    status = await member.client.status()
    if status.actor_id != member.actor_id:
        raise Unreachable(f"{member.address} was restarted: {member.actor_id} is {status.actor_id} now")


async def abort_members(spec: EpochSpec, members: Sequence[Member]) -> None:
    """Tell members to leave an epoch, ignoring those that cannot be told."""
    calls = [member.client.abort(spec.run_id, spec.epoch, timeout_s=5.0) for member in members if member.reachable]
    await asyncio.gather(*calls, return_exceptions=True)


def num_workers(member: Member) -> int:
    """Processes of this actor that join an epoch."""
    return member.status.num_workers if member.status is not None else 1


def at_fault(failed: Sequence[tuple[Member, OutriderError]]) -> Sequence[tuple[Member, OutriderError]]:
    """Of the members that failed to receive an update, those whose fault it was. They come in the order of the chain.

    One that is slow, gone or garbles bytes makes all others late. If everybody is only late, then the first one is at
    fault that has not even received what the ones before it wait to pass on.
    """
    if any(not isinstance(error, StageTimeout) for _, error in failed):
        return [(member, error) for member, error in failed if not isinstance(error, StageTimeout)]
    return [(member, error) for member, error in failed if not isinstance(error, StageBlocked)][:1]


async def _all_or_fail(
    what: str,
    members: Sequence[Member],
    calls: Sequence[Coroutine[Any, Any, Any]],
    own: "asyncio.Future[Any] | None" = None,
) -> list[Any]:
    """Wait for one call to each member, and for our own part; at the first failure leave the rest behind.

    Our own part failing says nothing of who is at fault, so the members then get a moment to say it themselves. So do
    the other members when one was late, or did not come in: what befell it may have befallen several.
    """
    tasks = [asyncio.ensure_future(_while_there(*pair)) for pair in zip(members, calls, strict=True)]
    waiting: set[asyncio.Future[Any]] = {*tasks} | ({own} if own is not None else set())
    try:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        failed = [future for future in done if _error(future) is not None]
        if not failed:
            return [task.result() for task in tasks]
        if failed == [own]:
            await asyncio.wait(tasks, timeout=1.0, return_when=asyncio.FIRST_EXCEPTION)
        if any(isinstance(_error(task), (StageTimeout, *_ABSENT)) for task in tasks):
            await asyncio.wait(tasks, timeout=_SPEAK_S)
        culprits = []
        for member, task in zip(members, tasks, strict=True):
            error = _error(task)
            if isinstance(error, OutriderError):
                culprits.append((member, error))
            elif error is not None:
                raise error
        told = at_fault(culprits) or culprits  # not what those say that waited for them
        reason = told[0][1] if told else _error(failed[0])
        raise EpochFailed(f"{what} failed: {reason}", culprits)
    finally:
        for future in waiting:
            future.cancel()
            future.add_done_callback(_look_at)


async def _commit_each(
    members: Sequence[Member],
    commits: Sequence[Coroutine[Any, Any, float]],
    on_commit: Callable[[Member], None],
) -> tuple[list[float], list[tuple[Member, OutriderError]]]:
    """Wait for the commit of each member, which has nothing to do with those of the others: pauses, and who failed."""
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    first: asyncio.Future[None] = loop.create_future()

    async def answer(member: Member, commit: Coroutine[Any, Any, float]) -> float:
        pause_s: float = await _while_there(member, commit)
        on_commit(member)
        if not first.done():
            first.set_result(None)
        return pause_s

    tasks = [asyncio.ensure_future(answer(*pair)) for pair in zip(members, commits, strict=True)]
    waiting: set[asyncio.Future[Any]] = {*tasks, first}
    try:
        while not first.done() and len(waiting) > 1:
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if tasks:
            first_s = loop.time() - started_at
            await asyncio.wait(tasks, timeout=max(_LAST_COMMIT_S, _LAST_COMMIT_RATIO * first_s))
    finally:
        for task in tasks:
            task.cancel()
            task.add_done_callback(_look_at)
    pauses: list[float] = []
    culprits: list[tuple[Member, OutriderError]] = []
    for member, task in zip(members, tasks, strict=True):
        if not task.done():
            late_s = loop.time() - started_at
            culprits.append((member, StageTimeout(f"{member.address} has not committed for {late_s:.0f} s")))
        elif isinstance(error := _error(task), OutriderError):
            culprits.append((member, error))
        else:
            pauses.append(task.result())
    return pauses, culprits


async def _while_there(member: Member, call: Coroutine[Any, Any, Any]) -> Any:
    """The call's result; it ends as soon as the fleet knows that the member is gone, not at its deadline."""
    calling = asyncio.ensure_future(call)
    left = asyncio.ensure_future(member.left.wait())
    try:
        await asyncio.wait({calling, left}, return_when=asyncio.FIRST_COMPLETED)
        if calling.done():
            return calling.result()
        raise Unreachable(f"{member.address} left the fleet: {member.reason}")
    finally:
        calling.cancel()
        left.cancel()
        calling.add_done_callback(_look_at)


def _error(future: "asyncio.Future[Any]") -> BaseException | None:
    return future.exception() if future.done() and not future.cancelled() else None


def _look_at(future: "asyncio.Future[Any]") -> None:
    """Whatever it still says is no news: the epoch is over."""
    _error(future)


def _abort_if_in(joined: "asyncio.Future[Sender]") -> None:
    if not joined.cancelled() and joined.exception() is None:
        joined.result().abort()
