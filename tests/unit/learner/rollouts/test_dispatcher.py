"""The dispatcher: what it sends, what ends it, and what happens to groups that come too late."""

import argparse
import asyncio
import dataclasses
import errno
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import learner.__main__ as learner_main
import learner.run as run_module
from common.config import ConfigError, NotYet
from common.errors import InvalidRequest
from common.types import SamplingParams
from learner.data.dataset import PromptDataset
from learner.data.ledger import Ledger
from learner.data.rows import RowReader
from learner.rollouts.buffer import BufferClosed, GroupBuffer
from learner.rollouts.credits import Credits
from learner.rollouts.dispatcher import Dispatcher, TooManyDrops
from learner.rollouts.fleet import Fleet
from learner.rollouts.sampler import Sampler
from learner.rollouts.tripwire import ImageMismatch
from learner.types import Dataset, Group, ProcessedPrompt, PromptSample
from tests.helpers.fakes import FakeActor, FakeProcessor, InlineRewards, Rows, make_sample, until


@dataclasses.dataclass
class Setup:
    actor: FakeActor
    fleet: Fleet
    ledger: Ledger
    buffer: GroupBuffer
    dispatcher: Dispatcher
    task: "asyncio.Task[None]"

    async def take(self, batch: int, version: int = 0, max_staleness: int = 0) -> list[int]:
        return [group.sequence for group in await self.groups(batch, version, max_staleness)]

    async def groups(self, batch: int, version: int = 0, max_staleness: int = 0) -> list[Group]:
        return await asyncio.to_thread(
            self.buffer.take, batch, version=version, max_staleness=max_staleness, timeout_s=20
        )


def one(**_: Any) -> float:
    return 1.0


@asynccontextmanager
async def dispatching(
    *,
    batch: int = 2,
    max_staleness: int = 0,
    total_steps: int | None = None,
    dataset: Dataset | None = None,
    reward: Callable[..., float] = one,
    actor: FakeActor | None = None,
    processor: FakeProcessor | None = None,
    **options: Any,
) -> AsyncIterator[Setup]:
    actor = actor or FakeActor("one", version=100)
    fleet = Fleet([actor.address], run_id=None, connect=lambda _: actor.connect(), poll_s=0.001)
    await fleet.start(startup_timeout_s=10)
    ledger, buffer = Ledger(0, 10), GroupBuffer((max_staleness + 1) * batch)
    dispatcher = Dispatcher(
        dataset=dataset or Rows(10),
        ledger=ledger,
        processor=processor or FakeProcessor(),
        sampler=Sampler(fleet),
        rewards=InlineRewards(reward),
        buffer=buffer,
        credits=Credits(batch, max_staleness, total_steps=total_steps),
        sampling=SamplingParams(n=3),
        run_id="r",
        **options,
    )
    task = asyncio.create_task(dispatcher.run())
    yield Setup(actor, fleet, ledger, buffer, dispatcher, task)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await fleet.close()


async def test_synchronous_training_samples_one_batch_per_step() -> None:
    async with dispatching(batch=2, max_staleness=0) as setup:
        assert await setup.take(2) == [0, 1]
        assert len(setup.actor.requests) == 2
        setup.ledger.mark_trained([0, 1])
        setup.dispatcher.set_version(1)
        groups = await setup.groups(2, version=1, max_staleness=100)
        assert [group.sequence for group in groups] == [2, 3]
        assert [len(completion.token_ids) for group in groups for completion in group.completions] == [2] * 6
        assert setup.dispatcher.stats().running == 0


async def test_it_never_runs_further_ahead_than_allowed() -> None:
    actor = FakeActor("one", gate=asyncio.Event())
    async with dispatching(batch=2, max_staleness=2, actor=actor) as setup:
        await until(lambda: len(actor.requests) >= 6)
        for _ in range(200):
            await asyncio.sleep(0)
        assert len(actor.requests) == 6
        assert setup.ledger.in_flight == set(range(6))


async def test_the_version_that_a_later_step_needs_is_waited_for() -> None:
    actor = FakeActor("one", version=0)
    async with dispatching(batch=1, max_staleness=0, actor=actor) as setup:
        assert await setup.take(1) == [0]
        setup.dispatcher.set_version(1)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(actor.requests) == 1  # it still serves version 0
        actor.version = 1
        assert await setup.take(1, version=1) == [1]
        assert actor.requests[1].min_policy_version == 1


async def test_a_group_of_equal_rewards_makes_room_for_another() -> None:
    def reward(*, ground_truth: str, token_ids: list[int], **_: Any) -> float:
        return float(token_ids[0]) if int(ground_truth) % 2 else 1.0

    async with dispatching(batch=2, reward=reward, drop_uniform_groups=True) as setup:
        taken = await setup.take(2)
        rows = [setup.ledger.row(sequence) for sequence in taken]
        assert all(row % 2 for row in rows)
        uniform = [sequence for sequence in range(max(taken)) if setup.ledger.row(sequence) % 2 == 0]
        assert {reason: sorted(sequences) for reason, sequences in setup.ledger.dropped.items()} == {
            "NO_SIGNAL": uniform
        }
        assert setup.dispatcher.stats().dropped == {"NO_SIGNAL": len(uniform)}


async def test_a_solved_task_does_not_sample_for_ever() -> None:
    async with dispatching(batch=2, drop_uniform_groups=True) as setup:
        await setup.take(2)
        assert setup.dispatcher.stats().dropped == {"NO_SIGNAL": 8 * 2}


async def test_too_stale_groups_are_sampled_again() -> None:
    actor = FakeActor("one", version=0)
    async with dispatching(batch=2, max_staleness=1, actor=actor) as setup:
        await until(lambda: len(setup.buffer) >= 4)
        # The first step takes two; for the second one the trainer has become stricter.
        assert await setup.take(2) == [0, 1]
        setup.ledger.mark_trained([0, 1])
        setup.dispatcher.set_version(1)
        actor.version = 1
        assert await setup.take(4, version=1, max_staleness=0) == [2, 3, 4, 5]
        assert setup.dispatcher.stats().dropped == {"STALE": 2}
        names = sorted(request.group_id for request in actor.requests if request.group_id.startswith("r.2."))
        # No two trajectories of a run share a name.
        assert names == ["r.2.0", "r.2.again2.0"]


async def test_groups_that_are_stale_again_and_again_have_new_names_and_leave_nothing_behind() -> None:
    actor = FakeActor("one", version=0)
    async with dispatching(batch=1, max_staleness=1, actor=actor) as setup:
        taking = asyncio.create_task(setup.take(2, version=1))
        await until(lambda: sum(request.group_id.startswith("r.1.") for request in actor.requests) > 3)
        actor.version = 1
        assert await taking == [0, 1]
        names = [request.group_id for request in actor.requests]
        assert len(set(names)) == len(names)
        assert not setup.dispatcher._taken_back


async def test_seeds_are_distinct_and_repeatable() -> None:
    seeds = []
    for _ in range(2):
        async with dispatching(batch=4, sampling_seed=7) as setup:
            await setup.take(4)
            seeds.append({r.group_id: r.sampling.seed for r in setup.actor.requests})
    assert seeds[0] == seeds[1] == {f"r.{s}.0": (7 << 32) + 3 * s for s in range(4)}


async def test_a_lost_image_ends_the_run_on_both_sides() -> None:
    def lose(sampled: Any) -> Any:
        return dataclasses.replace(
            sampled, prompt=dataclasses.replace(sampled.prompt, expanded_ids=sampled.prompt.expanded_ids[1:])
        )

    async with dispatching(actor=FakeActor("one", version=9, change=lose)) as setup:
        with pytest.raises(ImageMismatch, match=r"4 ids on the actor, 5 by the learner|5 ids on the actor, 6"):
            await setup.task
        with pytest.raises(ImageMismatch):
            await setup.take(1)


async def test_a_broken_row_ends_the_run() -> None:
    class Broken(Rows):
        def __getitem__(self, row: int) -> PromptSample:
            raise ConfigError(f"train.parquet: row {row} has 2 markers for 1 images")

    async with dispatching(dataset=Broken(10)) as setup:
        with pytest.raises(ConfigError, match="2 markers"):
            await setup.take(1)


async def test_a_disk_that_fails_ends_the_run_until_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in the data ends a Job for good (exit code 2); this is none."""

    def fail(_path: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", fail)
    rows = [{"prompt": "<image>", "images": "a.png", "answer": "1"}] * 10
    async with dispatching(dataset=PromptDataset(rows, RowReader("train.jsonl", base_dir=tmp_path))) as setup:
        with pytest.raises(
            NotYet, match=r"train.jsonl: row \d+ image 0 is the file .*a.png: Stale file handle"
        ) as caught:
            await setup.take(1)
    monkeypatch.setattr(run_module, "run", lambda _config: _raise(caught.value))
    config = tmp_path / "run.yaml"
    config.write_text("{model: {path: m}, data: {train: t}, trainer: {total_steps: 1, batch_prompts: 1}}")
    assert learner_main._run(argparse.Namespace(config=config, overrides=[])) == 1


def _raise(error: Exception) -> NoReturn:
    raise error


async def test_failed_rewards_are_dropped_counted_and_replaced() -> None:
    bad = {Ledger(0, 10).row(1), Ledger(0, 10).row(3)}

    def reward(*, ground_truth: str, **_: Any) -> float:
        return float("nan") if int(ground_truth) in bad else 1.0

    async with dispatching(batch=5, total_steps=1, reward=reward) as setup:
        assert await setup.take(5) == [0, 2, 4, 5, 6]
        assert {reason: sorted(sequences) for reason, sequences in setup.ledger.dropped.items()} == {
            "REWARD_NOT_FINITE": [1, 3]
        }
        assert setup.dispatcher.stats().dropped == {"REWARD_NOT_FINITE": 2}


async def test_prompts_with_too_many_tokens_are_dropped_counted_and_replaced() -> None:
    """Of all that they expand to, and before an actor is asked."""
    rows = [Ledger(0, 10).row(i) for i in range(5)]

    class Uneven(FakeProcessor):
        def process(self, sample: PromptSample) -> ProcessedPrompt:
            processed = super().process(sample)
            num_more = {rows[1]: 1, rows[3]: 7}.get(sample.row, 0)
            more = np.repeat(processed.input_ids[-1:], num_more)
            return dataclasses.replace(processed, input_ids=np.concatenate([processed.input_ids, more]))

    limit = len(FakeProcessor().process(make_sample(0)).input_ids)
    lines: list[str] = []
    async with dispatching(
        batch=3, total_steps=1, processor=Uneven(), max_prompt_tokens=limit, notify=lines.append
    ) as setup:
        assert await setup.take(3) == [0, 2, 4]
        assert setup.ledger.dropped == {"PROMPT_TOO_LONG": [1, 3]}
        assert setup.dispatcher.stats().dropped == {"PROMPT_TOO_LONG": 2}
        assert len(setup.actor.requests) == 3
    assert [line.partition(";")[0] for line in lines] == [
        f"group dropped, PROMPT_TOO_LONG: row {rows[1]}: its prompt has {limit + 1} tokens, more than "
        f"data.max_prompt_tokens ({limit})"
    ]


async def test_a_bound_that_no_prompt_keeps_ends_the_run() -> None:
    async with dispatching(max_prompt_tokens=1) as setup:
        with pytest.raises(TooManyDrops, match=r"64 groups in a row were dropped; .* data.max_prompt_tokens \(1\)"):
            await setup.take(1)


async def test_the_user_is_told_once_of_each_reason() -> None:
    first, second = (Ledger(0, 10).row(i) for i in (1, 3))
    lines: list[str] = []

    def reward(*, ground_truth: str, token_ids: Any) -> float:
        if int(ground_truth) in (first, second):
            raise KeyError("column")
        return float(token_ids[0]) if int(ground_truth) == Ledger(0, 10).row(2) else 0.0

    async with dispatching(
        batch=3, total_steps=1, reward=reward, drop_uniform_groups=True, notify=lines.append
    ) as setup:
        stats = setup.dispatcher.stats
        await until(lambda: stats().dropped.get("REWARD_RAISED", 0) > 1 and "NO_SIGNAL" in stats().dropped)
    [line] = [line for line in lines if "RAISED" in line]
    assert line.partition(" (")[0] in [  # they run at once
        f"group dropped, REWARD_RAISED: row {row}, completion 0: KeyError: 'column'" for row in (first, second)
    ]
    [line] = [line for line in lines if "NO_SIGNAL" in line]
    assert re.match(r"group dropped, NO_SIGNAL: row \d: its rewards are all equal; more of them", line)
    assert "Dropped groups" in line
    assert len(lines) == 2


async def test_a_dropped_group_is_told_by_the_row_of_its_file() -> None:
    """Not by its place in the part of the rows that is trained on."""

    class Part(Rows):
        def __getitem__(self, row: int) -> PromptSample:
            return make_sample(row + 100)

    lines: list[str] = []
    actor = FakeActor("one", version=100, failure=InvalidRequest("chat", "too long"))
    async with dispatching(dataset=Part(10), actor=actor, notify=lines.append) as setup:
        await until(lambda: bool(setup.dispatcher.stats().dropped))
    [line] = lines
    assert re.match(r"group dropped, INVALID_REQUEST: row 10\d: chat: too long;", line)  # any of those that run at once


async def test_nothing_but_failures_ends_the_run() -> None:
    def reward(**_: Any) -> float:
        raise KeyError("column")

    async with dispatching(reward=reward, max_consecutive_drops=5) as setup:
        with pytest.raises(TooManyDrops, match=r"5 groups in a row were dropped; the last: .*KeyError: 'column'"):
            await setup.take(1)


async def test_stopping_wakes_the_trainer() -> None:
    async with dispatching(actor=FakeActor("one", gate=asyncio.Event())) as setup:
        waiting = asyncio.ensure_future(setup.take(1))
        await asyncio.sleep(0)
        setup.task.cancel()
        with pytest.raises(BufferClosed):
            await waiting
        assert setup.actor.num_running == 0
