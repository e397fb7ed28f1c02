"""Opening an epoch, and leaving one, without a wire."""

import asyncio
import gc
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.errors import (
    DeadlineExceeded,
    OutriderError,
    RendezvousUnreachable,
    StageBlocked,
    StageCorrupt,
    StageTimeout,
    Unreachable,
)
from common.types import EpochSpec, Manifest, ManifestBucket
from learner.weights import epoch as module
from learner.weights.buckets import Update
from learner.weights.epoch import LATE as LATE_ERRORS
from learner.weights.epoch import CommitFailed, EpochFailed, TooSlow, at_fault, open_epoch
from tests.helpers.epoch_clients import Client, member
from tests.helpers.futures import done

SPEC = EpochSpec("run", 1, "127.0.0.1", 1, 2, 0, "gloo", 5.0)


LATE, BLOCKED, GONE = StageTimeout("late"), StageBlocked("late"), Unreachable("gone")


class After(Client):
    """Fails after `delay_s`."""

    def __init__(self, delay_s: float, error: BaseException) -> None:
        super().__init__("one#1")
        self.failure = (delay_s, error)

    async def open_epoch(self, spec: EpochSpec) -> None:
        delay_s, error = self.failure
        await asyncio.sleep(delay_s)
        raise error


class BreaksOff(Client):
    """Never joins; its call ends with an error of its own when it is cancelled."""

    async def open_epoch(self, spec: EpochSpec) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise Unreachable("the call was broken off") from None


class Transport:
    """Everybody is in at once; or the join fails `late`."""

    port = 1

    def __init__(self, late: asyncio.Event | None = None) -> None:
        self.late = late

    async def join(self, spec: EpochSpec) -> "Transport":
        if self.late is not None:
            await self.late.wait()
            raise RuntimeError("nobody came")
        return self

    async def send(self, buffers: Sequence[torch.Tensor], filled: Sequence[Future[int]]) -> None:
        for is_filled in filled:
            await asyncio.wrap_future(is_filled)

    def abort(self) -> None:
        pass


async def test_the_process_that_the_fleet_knows_comes_in() -> None:
    known = member(Client("one#1"))
    assert (await open_epoch(SPEC, [known], Transport())).members == (known,)


async def test_another_process_at_the_address_is_no_member() -> None:
    """It came up between two polls: updated in place of the one before, it would serve without the frozen weights."""
    client = Client("one#2")
    restarted = member(client)
    with pytest.raises(EpochFailed, match="one:1 was restarted: one#1 is one#2 now") as caught:
        await open_epoch(SPEC, [restarted], Transport())
    assert [culprit for culprit, _ in caught.value.culprits] == [restarted]
    assert client.aborted == 1


async def test_a_member_that_leaves_the_fleet_is_waited_for_no_longer() -> None:
    """A process that is stopped keeps its connections: its calls would end at their deadline."""
    client = Client("one#1")
    client.answers.clear()
    gone = member(client)
    opening = asyncio.create_task(open_epoch(SPEC, [gone], Transport(asyncio.Event())))
    await asyncio.sleep(0.01)
    assert not opening.done()
    gone.left.set()
    with pytest.raises(EpochFailed, match="one:1 left the fleet") as caught:
        await opening
    assert [culprit for culprit, _ in caught.value.culprits] == [gone]


async def test_who_does_not_even_answer_is_too_slow_and_not_those_that_wait_for_it() -> None:
    """Its server is well, or the fleet would know; what stands still is its engine."""
    waits, hangs = member(Client("one#1", StageTimeout("late"))), member(Client("one#1", DeadlineExceeded("no answer")))
    with pytest.raises(TooSlow) as caught:
        await open_epoch(SPEC, [waits, hangs], Transport(asyncio.Event()))
    assert [culprit for culprit, _ in caught.value.culprits] == [hangs]


async def test_who_cannot_reach_the_rendezvous_is_at_fault_and_not_those_that_wait_for_it() -> None:
    late = [member(Client("one#1", StageTimeout("late"))) for _ in range(2)]
    cut_off = member(Client("one#1", RendezvousUnreachable("no route")))
    with pytest.raises(TooSlow, match="opening epoch 1 failed: no route") as caught:
        await open_epoch(SPEC, [late[0], cut_off, late[1]], Transport(asyncio.Event()))
    assert [culprit for culprit, _ in caught.value.culprits] == [cut_off]


@pytest.mark.parametrize("error", [RendezvousUnreachable("no route"), DeadlineExceeded("no answer")])
async def test_all_that_do_not_come_in_are_at_fault_at_once_and_not_one_in_each_epoch(error: OutriderError) -> None:
    absent = [member(After(0.01 * i, error)) for i in range(6)]
    late = member(After(0.1, StageTimeout("late")))
    with pytest.raises(TooSlow) as caught:
        await open_epoch(SPEC, [*absent, late], Transport(asyncio.Event()))
    assert [culprit for culprit, _ in caught.value.culprits] == absent


async def test_a_call_that_is_broken_off_hides_nobody_at_fault() -> None:
    broken_off = member(After(0.01, asyncio.CancelledError()))
    cut_off = member(After(0.02, RendezvousUnreachable("no route")))
    with pytest.raises(TooSlow) as caught:
        await open_epoch(SPEC, [broken_off, cut_off], Transport(asyncio.Event()))
    assert [culprit for culprit, _ in caught.value.culprits] == [cut_off]


async def test_of_members_that_are_all_late_to_an_epoch_each_is_blamed_in_its_turn() -> None:
    """All at once, they would rest together, and come back together into the same epoch. Always the same one, and two
    others that cannot connect would meet in every epoch."""
    late = [member(Client("one#1", StageTimeout("late"))) for _ in range(3)]
    blamed = []
    for epoch in range(3, 7):
        with pytest.raises(
            TooSlow, match=f"opening epoch {epoch} failed: late; who is at fault is not known"
        ) as caught:
            await open_epoch(replace(SPEC, epoch=epoch), late, Transport(asyncio.Event()))
        blamed += [late.index(culprit) for culprit, _ in caught.value.culprits]
    assert blamed == [0, 1, 2, 0]


@pytest.mark.parametrize(("timeout_s", "expected"), [(5.0, 60.0), (300.0, 300.0)])
async def test_a_commit_has_the_time_of_an_update_and_never_less_than_a_minute(
    timeout_s: float, expected: float
) -> None:
    class Commits(Client):
        async def stage(self, *_: object, timeout_s: float) -> tuple[int, ...]:
            return ()

        async def commit(self, run_id: str, epoch: int, policy_version: int, *, timeout_s: float) -> float:
            given.append(timeout_s)
            return 0.0

    given: list[float] = []
    epoch = await open_epoch(replace(SPEC, timeout_s=timeout_s), [member(Commits("one#1"))], Transport())
    await epoch.send(Update(Manifest(1, (), (), updates_vision=False), (), ()))
    assert given == [expected]


class Receives(Client):
    """Answers with `checksums`, or fails."""

    def __init__(self, *checksums: int, error: OutriderError | None = None, delay_s: float = 0.0) -> None:
        super().__init__("one#1")
        self.checksums = checksums
        self.failure = error
        self.delay_s = delay_s
        self.committed = 0

    async def stage(self, *_: object, timeout_s: float) -> tuple[int, ...]:
        await asyncio.sleep(self.delay_s)
        if self.failure is not None:
            raise self.failure
        return self.checksums

    async def commit(self, run_id: str, epoch: int, policy_version: int, *, timeout_s: float) -> float:
        self.committed += 1
        return 0.0


def update(*checksums: Future[int]) -> Update:
    """Of version 1, whose manifest knows no checksum."""
    buckets = tuple(ManifestBucket(4, None) for _ in checksums)
    return Update(Manifest(1, (), buckets, updates_vision=False), tuple(torch.zeros(4) for _ in checksums), checksums)


@pytest.mark.parametrize("torn", [(7, 9), (7,), (), (7, 8, 8)])
async def test_what_was_not_received_as_it_was_sent_is_committed_nowhere(torn: tuple[int, ...]) -> None:
    """The manifest may have gone out before the checksums were known: then nobody but the learner can tell."""
    clients = [Receives(7, 8), Receives(*torn)]
    members = [member(client) for client in clients]
    epoch = await open_epoch(SPEC, members, Transport())
    with pytest.raises(EpochFailed, match="one:1 has not received what was sent") as caught:
        await epoch.send(update(done(7), done(8)))
    assert [(culprit, type(error)) for culprit, error in caught.value.culprits] == [(members[1], StageCorrupt)]
    assert [client.committed for client in clients] == [0, 0]


class CommitsAfter(Receives):
    """Takes so long."""

    def __init__(self, commit_s: float) -> None:
        super().__init__()
        self.commit_s = commit_s

    async def commit(self, *_: object, timeout_s: float) -> float:
        await asyncio.sleep(min(self.commit_s, timeout_s))
        if self.commit_s > timeout_s:
            raise DeadlineExceeded("no answer")
        return self.commit_s


async def _committed(*commits_s: float, timeout_s: float = 5.0) -> tuple[list[int], list[int]]:
    """Of members that take so long: which are through, and which are at fault."""
    members = [member(CommitsAfter(commit_s)) for commit_s in commits_s]
    through: list[int] = []
    late: list[int] = []
    epoch = await open_epoch(replace(SPEC, timeout_s=timeout_s), members, Transport())
    try:
        await epoch.send(update(), lambda member: through.append(members.index(member)))
    except CommitFailed as failure:
        late = [members.index(culprit) for culprit, error in failure.culprits if isinstance(error, LATE_ERRORS)]
    return through, late


@pytest.mark.timeout(20)  # of the minute that a commit has
async def test_a_commit_that_hangs_keeps_the_others_no_longer_than_ten_times_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_LAST_COMMIT_S", 0.1)
    assert await _committed(0.0, math.inf, 0.01) == ([0, 2], [1])
    assert await _committed(0.05, 0.2) == ([0, 1], [])


async def test_the_first_commit_has_all_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LAST_COMMIT_S", 0.0)
    monkeypatch.setattr(module, "_MIN_COMMIT_TIMEOUT_S", 0.5)
    assert await _committed(0.3, timeout_s=0.5) == ([0], [])
    assert await _committed(math.inf, math.inf, timeout_s=0.5) == ([], [0, 1])


async def test_who_waits_for_the_gather_is_not_at_fault() -> None:
    late, well, gone = Receives(error=StageTimeout("late")), Receives(error=StageBlocked("")), Receives(error=GONE)
    members = [member(client) for client in (late, well, gone)]
    for said, expected in ((members[:2], []), (members, members[2:])):
        epoch = await open_epoch(SPEC, said, Transport())
        with pytest.raises(EpochFailed, match=r"0\.0 s went by with the gather") as caught:
            await epoch.send(update(done(7), Future()))
        assert not isinstance(caught.value, TooSlow)
        assert [culprit for culprit, _ in caught.value.culprits] == expected


@pytest.mark.parametrize(("gather_s", "is_at_fault"), [(0.05, True), (0.45, False), (0.55, False)])
async def test_who_waited_for_most_of_the_time_is_not_at_fault_either(gather_s: float, is_at_fault: bool) -> None:
    """Also where all is gathered by the time at which the learner looks."""
    spec = replace(SPEC, timeout_s=0.5)
    late: Future[int] = Future()
    members = [member(Receives(error=StageTimeout("late"), delay_s=0.6))]
    epoch = await open_epoch(spec, members, Transport())
    asyncio.get_running_loop().call_later(gather_s, late.set_result, 8)
    with pytest.raises(EpochFailed) as caught:
        await epoch.send(update(done(7), late))
    assert isinstance(caught.value, TooSlow) == is_at_fault
    assert [culprit for culprit, _ in caught.value.culprits] == members * is_at_fault


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([BLOCKED, LATE, LATE], [1]),  # the first one waits for the second to take what it has
        ([LATE, LATE, LATE], [0]),
        ([BLOCKED, BLOCKED, LATE], [2]),
        ([BLOCKED, GONE, LATE], [1]),
        ([LATE, BLOCKED, GONE], [2]),
        ([BLOCKED], []),
    ],
)
def test_the_first_that_did_not_even_receive_is_at_fault(errors: list[OutriderError], expected: list[int]) -> None:
    members = [member(Client(f"{i}")) for i in range(len(errors))]
    found = at_fault(list(zip(members, errors, strict=True)))
    assert [members.index(culprit) for culprit, _ in found] == expected


async def test_what_fails_after_the_end_is_no_news() -> None:
    unseen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    late = asyncio.Event()
    members = [member(Client("one#1", Unreachable("no room"))), member(BreaksOff("one#1"))]
    with pytest.raises(EpochFailed, match="no room"):
        await open_epoch(SPEC, members, Transport(late))
    late.set()
    for _ in range(5):
        await asyncio.sleep(0)
    gc.collect()
    assert not unseen
