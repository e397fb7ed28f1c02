"""In which form actors get a LoRA adapter."""

from typing import Any, cast

import pytest

from common.errors import InvalidRequest, StageTimeout
from common.types import ActorState, ActorStatus
from learner.rollouts.members import Member
from learner.weights.adapter_forms import AdapterForms
from learner.weights.buckets import Buckets
from learner.weights.snapshot import AdapterFacts, Snapshot

EMPTY = Buckets((), (), ())


def snapshot(adapter: AdapterFacts | None) -> Snapshot:
    return Snapshot(1, EMPTY, EMPTY, trains_vision=False, adapter=adapter)


def member(max_lora_rank: int) -> Member:
    status = ActorStatus("a", ActorState.SERVING, 0, "run", 1, -1, 0, 0, 1, max_lora_rank)
    return Member("one:1", cast("Any", None), 1, "a", ActorState.SERVING, status=status)


@pytest.mark.parametrize(
    ("adapter", "ranks", "always_merged", "expected"),
    [
        (None, [0], False, False),
        (None, [0], True, False),
        (AdapterFacts(8, {}), [8, 16], False, False),
        (AdapterFacts(8, {}), [16, 4], False, True),
        (AdapterFacts(8, {}), [0], False, True),
        (AdapterFacts(8, {}), [8], True, True),
        (AdapterFacts(8, {}, "the tower has one"), [8], False, True),
    ],
)
def test_merged_for_all_unless_all_take_it(
    adapter: AdapterFacts | None, ranks: list[int], always_merged: bool, expected: bool
) -> None:
    members = [member(rank) for rank in ranks]
    assert AdapterForms(always_merged=always_merged).choose(snapshot(adapter), members) is expected


def test_the_user_hears_once_that_actors_take_no_adapter() -> None:
    """Locally they are started so that they do; elsewhere their own file has to say it."""
    said: list[str] = []
    adapter = AdapterFacts(8, {})
    for forms, facts, rank in (
        (AdapterForms(always_merged=True, notify=said.append), adapter, 0),
        (AdapterForms(always_merged=False, notify=said.append), AdapterFacts(8, {}, "the tower has one"), 0),
        (AdapterForms(always_merged=False, notify=said.append), adapter, 8),
    ):
        forms.choose(snapshot(facts), [member(rank)])
    assert said == []
    forms = AdapterForms(always_merged=False, notify=said.append)
    for _ in range(2):
        forms.choose(snapshot(adapter), [member(0)])
    [line] = said
    assert line.endswith("merged into them: actor one:1 takes adapters up to rank 0 (vllm.max_lora_rank), not 8")


def test_a_change_of_form_is_a_full_update_also_after_a_failure() -> None:
    forms, taken, one = AdapterForms(always_merged=False), snapshot(AdapterFacts(8, {})), member(8)
    assert forms.changes(taken, [one], merged=False)  # it has nothing yet
    forms.committed(one, merged=False)
    assert not forms.changes(taken, [one], merged=False)
    assert forms.changes(taken, [one], merged=True)
    forms.unknown(one)  # half-way: it may have it merged
    assert forms.changes(taken, [one], merged=False)
    forms.committed(one, merged=False)
    assert not forms.changes(taken, [one], merged=False)
    assert not forms.changes(snapshot(None), [one], merged=False)


def test_an_actor_that_refuses_the_adapter_gets_it_merged() -> None:
    forms, taken = AdapterForms(always_merged=False), snapshot(AdapterFacts(8, {}))
    assert not forms.is_refusal(StageTimeout("late"))
    assert not forms.is_refusal(InvalidRequest("manifest.parameters", "odd"))
    assert not forms.choose(taken, [member(8)])
    assert forms.is_refusal(InvalidRequest("manifest.adapter", "no such modules"))
    assert forms.choose(taken, [member(8)])
