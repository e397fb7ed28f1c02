"""The buffer between the event loop and the trainer's thread."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.rollouts.buffer import BufferClosed, GroupBuffer
from learner.types import Group
from tests.helpers.fakes import make_completion, make_group


def fill(buffer: GroupBuffer, *groups: tuple[int, int]) -> None:
    for sequence, version in groups:
        buffer.put(make_group(sequence, version))


def test_oldest_policy_first_then_data_order() -> None:
    buffer = GroupBuffer(8)
    fill(buffer, (5, 2), (4, 1), (3, 2), (9, 1))
    assert [g.sequence for g in buffer.take(3, version=2, max_staleness=1)] == [3, 4, 9]
    assert len(buffer) == 1


def test_too_stale_groups_go_back() -> None:
    buffer = GroupBuffer(8)
    returned: list[int] = []
    buffer.on_stale = lambda groups: returned.extend(g.sequence for g in groups)
    fill(buffer, (0, 0), (1, 1), (2, 2))
    with pytest.raises(TimeoutError):
        buffer.take(3, version=2, max_staleness=1, timeout_s=0.01)
    assert returned == [0]
    assert [g.sequence for g in buffer.take(2, version=2, max_staleness=1)] == [1, 2]


def test_one_old_token_makes_a_group_old() -> None:
    group = make_group(0, version=5)
    old = make_group(0, version=3).completions[1]
    mixed = Group(
        group.group_id, 0, group.sample, group.processed, group.prompt, (group.completions[0], old), group.rewards
    )
    assert mixed.oldest_version == 3
    buffer = GroupBuffer(2)
    returned: list[Group] = []
    buffer.on_stale = returned.extend
    buffer.put(mixed)
    with pytest.raises(TimeoutError):
        buffer.take(1, version=5, max_staleness=1, timeout_s=0.01)
    assert returned == [mixed]


def test_take_blocks_until_the_batch_is_full() -> None:
    buffer = GroupBuffer(4)
    with ThreadPoolExecutor(1) as trainer:
        fill(buffer, (1, 0))
        taken = trainer.submit(buffer.take, 2, version=0, max_staleness=0)
        while not (taken.done() or buffer._changed._waiters):  # type: ignore[attr-defined]
            time.sleep(0.001)
        assert not taken.done()
        fill(buffer, (0, 0))
        assert [g.sequence for g in taken.result(timeout=10)] == [0, 1]


def test_a_group_sampled_again_completes_the_waiting_batch() -> None:
    buffer = GroupBuffer(4)
    stale = threading.Event()
    buffer.on_stale = lambda _: stale.set()
    fill(buffer, (0, 0), (1, 1))
    with ThreadPoolExecutor(1) as trainer:
        taken = trainer.submit(buffer.take, 2, version=1, max_staleness=0)
        assert stale.wait(10)
        fill(buffer, (0, 1))
        assert [(g.sequence, g.oldest_version) for g in taken.result(timeout=10)] == [(0, 1), (1, 1)]


def test_failure_and_close_reach_a_blocked_trainer() -> None:
    ends: list[tuple[Callable[[GroupBuffer], None], type[Exception]]] = [
        (lambda b: b.fail(ValueError("lost")), ValueError),
        (lambda b: b.close(), BufferClosed),
    ]
    for end, error in ends:
        buffer = GroupBuffer(4)
        with ThreadPoolExecutor(1) as trainer:
            taken = trainer.submit(buffer.take, 2, version=0, max_staleness=0)
            end(buffer)
            with pytest.raises(error):
                taken.result(timeout=10)
        with pytest.raises(error):
            buffer.take(1, version=0, max_staleness=0)


def test_the_first_error_stays() -> None:
    buffer = GroupBuffer(1)
    buffer.fail(ValueError("cause"))
    buffer.close()
    with pytest.raises(ValueError, match="cause"):
        buffer.take(1, version=0, max_staleness=0)


def test_it_is_bounded_and_takes_no_group_twice() -> None:
    buffer = GroupBuffer(2)
    fill(buffer, (0, 0), (1, 0))
    with pytest.raises(ValueError, match="in the buffer already"):
        fill(buffer, (1, 0))
    with pytest.raises(ValueError, match="2 groups already"):
        fill(buffer, (2, 0))


@given(
    groups=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    batch=st.integers(1, 4),
    version=st.integers(0, 6),
    max_staleness=st.integers(0, 4),
)
def test_every_group_is_taken_or_returned_once(groups: list[int], batch: int, version: int, max_staleness: int) -> None:
    buffer = GroupBuffer(len(groups))
    returned: list[int] = []
    buffer.on_stale = lambda stale: returned.extend(g.sequence for g in stale)
    fill(buffer, *enumerate(groups))
    taken: list[int] = []
    fresh = [sequence for sequence, born in enumerate(groups) if version - born <= max_staleness]
    for _ in range(len(fresh) // batch):
        taken += [g.sequence for g in buffer.take(batch, version=version, max_staleness=max_staleness, timeout_s=1)]
    with pytest.raises(TimeoutError):
        buffer.take(batch, version=version, max_staleness=max_staleness, timeout_s=0)
    assert sorted(returned) == sorted(set(range(len(groups))) - set(fresh))
    assert len(taken) == len(set(taken)) == len(fresh) // batch * batch
    assert set(taken) <= set(fresh)
    # The oldest ones were taken.
    ages = sorted((groups[sequence], sequence) for sequence in fresh)
    assert sorted(taken) == sorted(sequence for _, sequence in ages[: len(taken)])


@pytest.mark.parametrize(("max_stale_share", "is_trained"), [(0.0, False), (0.24, False), (0.25, True), (0.26, True)])
def test_a_share_of_old_tokens_may_be_allowed(max_stale_share: float, is_trained: bool) -> None:
    """Of 8 tokens the first 2 are of version 3, which is too old at version 5 with a staleness of 1."""
    group = make_group(0, version=5)
    long = make_completion("g0", 1, "a", ((3, 2), (4, 3), (5, 1)))
    mixed = dataclasses.replace(group, completions=(group.completions[0], long))
    assert mixed.stale_share(4) == 0.25
    buffer = GroupBuffer(2, max_stale_share=max_stale_share)
    returned: list[Group] = []
    buffer.on_stale = returned.extend
    buffer.put(mixed)
    if is_trained:
        assert buffer.take(1, version=5, max_staleness=1, timeout_s=0.01) == [mixed]
    else:
        with pytest.raises(TimeoutError):
            buffer.take(1, version=5, max_staleness=1, timeout_s=0.01)
        assert returned == [mixed]


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=4), min_size=1, max_size=4)
)
def test_staleness_only_grows_with_the_version(spans: list[list[tuple[int, int]]]) -> None:
    """Also across a resume, which goes on at the version of its checkpoint: what is too stale stays so."""
    ascending = [sorted(of_one) for of_one in spans]
    completions = tuple(make_completion("g", i, "a", of_one) for i, of_one in enumerate(ascending))
    group = dataclasses.replace(make_group(0), completions=completions)
    shares = [group.stale_share(version) for version in range(7)]
    assert shares == sorted(shares)
    assert [share > 0 for share in shares] == [version > group.oldest_version for version in range(7)]
    tokens = [version for of_one in ascending for version, length in of_one for _ in range(length)]
    assert shares[2] == sum(version < 2 for version in tokens) / len(tokens)


@pytest.mark.timeout(60)
def test_the_tokens_of_a_group_are_looked_at_once_however_many_come() -> None:
    """Each group that comes wakes who waits for a batch, on whose lock the event loop puts the next one."""
    looked_at: list[str] = []

    class Counted(Group):
        @property
        def oldest_version(self) -> int:
            looked_at.append("oldest")
            return super().oldest_version

        def stale_share(self, oldest_allowed: int) -> float:
            looked_at.append("share")
            return super().stale_share(oldest_allowed)

    buffer = GroupBuffer(200)
    fields = [field.name for field in dataclasses.fields(Group)]
    with ThreadPoolExecutor(1) as trainer:

        def accept(_: Sequence[Group]) -> bool:
            return len(buffer._groups) == 200

        taken = trainer.submit(buffer.take, 100, version=3, max_staleness=1, accept=accept)
        for sequence in range(200):
            group = make_group(sequence, version=2 + sequence % 2)
            buffer.put(Counted(**{name: getattr(group, name) for name in fields}))
        assert [group.sequence for group in taken.result()] == list(range(0, 200, 2))
    assert looked_at == ["oldest"] * 200
