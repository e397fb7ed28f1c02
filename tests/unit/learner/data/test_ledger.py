"""The ledger: data order, and every sequence number ended exactly once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.config import ConfigError
from learner.data.ledger import Ledger


@given(seed=st.integers(0, 2**31), num_rows=st.integers(1, 40), num_epochs=st.integers(1, 4))
def test_each_epoch_is_a_permutation_and_a_pure_function(seed: int, num_rows: int, num_epochs: int) -> None:
    ledger = Ledger(seed, num_rows)
    forwards = [ledger.row(sequence) for sequence in range(num_rows * num_epochs)]
    for epoch in range(num_epochs):
        assert sorted(forwards[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    # Asked in another order, by another object.
    other = Ledger(seed, num_rows)
    assert [other.row(sequence) for sequence in reversed(range(num_rows * num_epochs))] == forwards[::-1]


def test_epochs_and_seeds_differ() -> None:
    ledger, other = Ledger(0, 1000), Ledger(1, 1000)
    first = [ledger.row(sequence) for sequence in range(1000)]
    assert first != list(range(1000))
    assert first != [ledger.row(sequence) for sequence in range(1000, 2000)]
    assert first != [other.row(sequence) for sequence in range(1000)]


def test_resume_hands_out_what_was_in_flight_first() -> None:
    ledger = Ledger(3, 10)
    assert [ledger.next_sequence() for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    ledger.mark_trained([0, 3])
    ledger.mark_dropped(1, "REWARD_RAISED")
    ledger.give_back(4)
    state = json.loads(json.dumps(ledger.to_dict()))
    resumed = Ledger.from_dict(state, seed=3, num_rows=10)
    assert [resumed.next_sequence() for _ in range(4)] == [2, 4, 5, 6]
    assert resumed.num_trained == 2
    assert resumed.dropped == {"REWARD_RAISED": [1]}
    assert resumed.row(2) == ledger.row(2)


@pytest.mark.parametrize(("seed", "num_rows", "name"), [(4, 10, "seed"), (3, 11, "num_rows")])
def test_resume_with_another_order_is_refused(seed: int, num_rows: int, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = ") as caught:
        Ledger.from_dict(Ledger(3, 10).to_dict(), seed=seed, num_rows=num_rows)
    assert "\n" not in str(caught.value)


def test_nothing_ends_twice() -> None:
    ledger = Ledger(0, 4)
    sequence = ledger.next_sequence()
    ledger.mark_trained([sequence])
    with pytest.raises(ValueError, match="not in flight"):
        ledger.mark_trained([sequence])
    with pytest.raises(ValueError, match="not in flight"):
        ledger.give_back(sequence)
    with pytest.raises(ValueError, match="not in flight"):
        ledger.mark_dropped(sequence, "X")
    with pytest.raises(ValueError, match="not in flight"):
        ledger.mark_trained([99])
    assert ledger.num_trained == 1


class LedgerMachine(RuleBasedStateMachine):
    """Any history, with restarts in between, against a dictionary from sequence number to fate."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(7, 5)
        self.fate: dict[int, str] = {}

    @rule()
    def hand_out(self) -> None:
        waiting = [sequence for sequence, fate in self.fate.items() if fate == "again"]
        expected = min(waiting) if waiting else len(self.fate)
        assert self.ledger.next_sequence() == expected
        self.fate[expected] = "in flight"

    def _flying(self) -> list[int]:
        return sorted(sequence for sequence, fate in self.fate.items() if fate == "in flight")

    @precondition(lambda self: self._flying())
    @rule(data=st.data(), fate=st.sampled_from(["trained", "again", "dropped"]))
    def end(self, data: st.DataObject, fate: str) -> None:
        sequence = data.draw(st.sampled_from(self._flying()))
        if fate == "trained":
            self.ledger.mark_trained([sequence])
        elif fate == "again":
            self.ledger.give_back(sequence)
        else:
            self.ledger.mark_dropped(sequence, "R")
        self.fate[sequence] = fate

    @rule()
    def restart(self) -> None:
        self.ledger = Ledger.from_dict(json.loads(json.dumps(self.ledger.to_dict())), seed=7, num_rows=5)
        for sequence in self._flying():
            self.fate[sequence] = "again"

    @invariant()
    def counts(self) -> None:
        fates = list(self.fate.values())
        assert self.ledger.num_trained == fates.count("trained")
        assert self.ledger.in_flight == {s for s, fate in self.fate.items() if fate in ("in flight", "again")}
        assert sum(map(len, self.ledger.dropped.values())) == fates.count("dropped")


TestLedgerMachine = LedgerMachine.TestCase
