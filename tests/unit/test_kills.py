"""The books of `python -m tests.kills` find what is wrong in a run."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from actor.config import FakeConfig
from actor.engine import EngineRequest
from actor.engine_fake.engine import FakeEngine
from benchmarks.simulated import FakeModelProcessor, Run, make_prompts
from common.types import ChatPrompt, Completion, PromptInfo, SamplingParams, VersionSpan
from learner.data.ledger import Ledger
from learner.types import Group
from tests.kills.books import Books, Broken

CONFIG = FakeConfig(mean_tokens=5, token_s=0.0)
PROMPTS = make_prompts(100)
N = 2


@pytest.fixture
def books() -> Books:
    return Books(PROMPTS, CONFIG.model_copy(update={"token_s": 60.0}), n=N, max_tokens=7, batch=1, max_staleness=1)


def sampled(sequence: int) -> Group:
    """As an actor of version 0 would have sampled it."""
    sample = PROMPTS[Ledger(0, len(PROMPTS)).row(sequence)]
    sampling = SamplingParams(n=N, max_tokens=7, seed=sequence * N)
    request = EngineRequest(f"g{sequence}", ChatPrompt(sample.messages), (), sampling)

    async def generate() -> list[PromptInfo | list[Completion]]:
        engine = FakeEngine(CONFIG, "a1")
        return [e async for e in engine.generate(request)]

    prompt, *parts = asyncio.run(generate())
    assert isinstance(prompt, PromptInfo)
    completions = sorted((c for part in parts for c in part), key=lambda c: c.index)
    processed = FakeModelProcessor().process(sample)
    return Group(f"g{sequence}", sequence, sample, processed, prompt, tuple(completions), np.zeros(N, np.float32))


def finished(*groups: Group, again: int = 0, **line: Any) -> Run:
    """A run of one step for each of these groups, with its books in order."""
    ledger = Ledger(0, len(PROMPTS))
    for _ in groups:
        ledger.next_sequence()
    ledger.mark_trained([group.sequence for group in groups])
    dropped = {"STALE": again} if again else {}
    steps = [{"sequences": [g.sequence], "num_tokens": num_tokens(g), "groups_dropped": dropped} | line for g in groups]
    return Run(tuple(steps), (0,) * len(groups), (0.0,) * len(groups), ledger)


def num_tokens(group: Group) -> int:
    return sum(len(completion.token_ids) for completion in group.completions)


def test_a_run_in_order(books: Books) -> None:
    groups = [sampled(0), sampled(1)]
    for version, group in enumerate(groups, 1):
        books.check_step(version, [group])
    books.check_end(finished(*groups, again=3), {"a1": {0}})
    assert books.num_trained == 2


def first(group: Group, **changes: Any) -> Group:
    """With another first completion."""
    changed = dataclasses.replace(group.completions[0], **changes)
    return dataclasses.replace(group, completions=(changed, *group.completions[1:]))


WRONG: dict[str, tuple[Callable[[Group], Group], str]] = {
    "a token": (lambda g: first(g, token_ids=g.completions[0].token_ids + 1), "not what the engine makes"),
    "a logprob": (lambda g: first(g, logprobs=g.completions[0].logprobs * 1.001), "not what the engine makes"),
    "a row": (lambda g: dataclasses.replace(g, sample=PROMPTS[(g.sample.row + 1) % 100]), "is of row"),
    "a seed": (lambda g: dataclasses.replace(g, completions=sampled(5).completions), "not what the engine makes"),
    "an actor": (
        lambda g: dataclasses.replace(g, prompt=dataclasses.replace(g.prompt, actor_id="a2")),
        "is not of actor a2",
    ),
    "a part": (lambda g: dataclasses.replace(g, completions=g.completions[:1]), "has 1 completions"),
    "a version": (lambda g: first(g, version_spans=(VersionSpan(1, 0, 5),)), "-1 versions old"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_group_is_found(what: str, books: Books) -> None:
    change, said = WRONG[what]
    with pytest.raises(Broken, match=said):
        books.check_step(1, [change(sampled(0))])


def test_a_group_that_is_trained_twice_is_found(books: Books) -> None:
    books.check_step(1, [sampled(0)])
    with pytest.raises(Broken, match="second time"):
        books.check_step(2, [sampled(0)])


def test_a_group_that_is_too_stale_is_found(books: Books) -> None:
    books.check_step(1, [sampled(0)])
    books.check_step(2, [sampled(1)])
    with pytest.raises(Broken, match="2 versions old"):
        books.check_step(3, [sampled(2)])


def test_what_is_wrong_at_the_end_is_found(books: Books) -> None:
    group = sampled(0)
    books.check_step(1, [group])
    served = {"a1": {0}}
    with pytest.raises(Broken, match="not served"):
        books.check_end(finished(group), {"a1": {1}, "a2": {0}})
    with pytest.raises(Broken, match="1 tokens"):
        books.check_end(finished(group, num_tokens=1), served)
    with pytest.raises(Broken, match="the metrics count"):
        books.check_end(finished(group, groups_dropped={"ATTEMPTS_EXHAUSTED": 1}), served)
    run = finished(group)
    run.ledger.next_sequence()
    with pytest.raises(Broken, match=r"in flight at the end: \[1\]"):
        books.check_end(run, served)
    run.ledger.mark_dropped(1, "LOST")
    with pytest.raises(Broken, match="LOST"):
        books.check_end(run, served)


def test_a_group_that_is_lost_is_found(books: Books) -> None:
    books.check_step(1, [sampled(1)])
    with pytest.raises(Broken, match=r"\[0\] were neither trained nor dropped"):
        books.check_end(finished(sampled(0)), {"a1": {0}})


def test_a_group_that_is_dropped_for_no_reason_is_found(books: Books) -> None:
    group = sampled(0)
    books.check_step(1, [group])
    run = finished(group, groups_dropped={"REWARD_RAISED": 1})
    run.ledger.next_sequence()
    run.ledger.mark_dropped(1, "REWARD_RAISED")
    with pytest.raises(Broken, match="dropped for their rewards"):
        books.check_end(run, {"a1": {0}})
