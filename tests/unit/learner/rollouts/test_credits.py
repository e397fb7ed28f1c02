"""The credit inequality, against a simulation that knows only the definition of staleness."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.rollouts.credits import Credits


def test_by_hand() -> None:
    tokens = Credits(batch=4, max_staleness=1)
    assert tokens.available == 8
    assert [tokens.start() for _ in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert tokens.available == 0
    for _ in range(4):
        tokens.accept()
    assert tokens.available == 0
    tokens.step = 1
    assert tokens.available == 4
    assert tokens.start() == 2


def test_resumed_and_bounded_by_the_last_step() -> None:
    tokens = Credits(batch=2, max_staleness=3, step=8, total_steps=10)
    assert tokens.accepted == 16
    assert tokens.available == 4
    assert [tokens.start() for _ in range(4)] == [8, 8, 9, 9]
    tokens.step = 10
    assert tokens.available == 0


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="batch must be 1 or more"):
        Credits(batch=0, max_staleness=0)
    tokens = Credits(batch=1, max_staleness=0)
    with pytest.raises(ValueError, match="no group is running"):
        tokens.accept()
    with pytest.raises(ValueError, match="has been trained"):
        tokens.take_back()
    with pytest.raises(ValueError, match="has been trained"):
        Credits(batch=4, max_staleness=0, step=2).take_back()
    tokens.start()
    with pytest.raises(ValueError, match="no credit"):
        tokens.start()


@given(
    batch=st.integers(1, 5),
    max_staleness=st.integers(0, 3),
    moves=st.lists(st.sampled_from(["finish", "drop", "stale", "step"]), max_size=60),
)
def test_nothing_is_dispatched_too_early_and_all_is_dispatched_in_time(
    batch: int, max_staleness: int, moves: list[str]
) -> None:
    tokens = Credits(batch=batch, max_staleness=max_staleness)
    running = buffered = trained = 0

    def dispatch() -> None:
        nonlocal running
        while tokens.available:
            # This group is trained after all those before it: at least (trained + buffered + running) // batch.
            earliest_step = (trained + buffered + running) // batch
            assert tokens.start() == earliest_step
            assert earliest_step - trained // batch <= max_staleness
            running += 1

    for move in moves:
        dispatch()
        # No dead lock: either a batch is there, or groups for it are running.
        assert buffered + running >= batch
        if move == "finish" and running:
            tokens.accept()
            running, buffered = running - 1, buffered + 1
        elif move == "drop" and running:
            tokens.drop()
            running -= 1
        elif move == "stale" and buffered:
            tokens.take_back()
            buffered -= 1
        elif move == "step" and buffered >= batch:
            buffered, trained = buffered - batch, trained + batch
            tokens.step += 1
        assert (tokens.running, tokens.accepted) == (running, buffered + trained)
        assert tokens.accepted + tokens.running <= (max_staleness + 1 + tokens.step) * batch
