"""The state machine against an engine whose every answer the test controls."""

import asyncio
import dataclasses
from typing import Any

import pytest

from actor.weights.policy_state import PolicyState
from common.errors import (
    Draining,
    EngineDead,
    InvalidRequest,
    NotStaged,
    StageCorrupt,
    StageTimeout,
    StaleEpoch,
)
from common.types import ActorState, EpochSpec, Manifest, ManifestBucket, ManifestParameter
from tests.helpers.fakes import until


class ScriptedEngine:
    """Notes each call; `hold` makes one operation wait until it is set."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.hold: dict[str, asyncio.Event] = {}
        self.error: dict[str, Exception] = {}
        self.checksums: tuple[int, ...] = (11, 22)

    async def _step(self, name: str, label: str) -> None:
        self.calls.append(label)
        if name in self.hold:
            await self.hold[name].wait()
        if name in self.error:
            raise self.error[name]

    async def open_epoch(self, spec: EpochSpec) -> None:
        await self._step("open", f"open {spec.run_id}{spec.epoch}")

    async def stage(self, manifest: Manifest, timeout_s: float) -> tuple[int, ...]:
        await self._step("stage", f"stage {manifest.policy_version}")
        return self.checksums

    async def commit(self, policy_version: int) -> float:
        await self._step("commit", f"commit {policy_version}")
        return 0.5

    async def abort_epoch(self) -> None:
        self.calls.append("leave")

    async def pause(self) -> None:
        await self._step("pause", "pause")

    async def resume(self) -> None:
        await self._step("resume", "resume")


def spec(run_id: str = "a", epoch: int = 1, timeout_s: float = 5.0) -> EpochSpec:
    return EpochSpec(run_id, epoch, "127.0.0.1", 1, 2, 1, "gloo", timeout_s)


def manifest(version: int) -> Manifest:
    parameter = ManifestParameter("w", "F32", (2,), 0, 0)
    return Manifest(version, (parameter,), (ManifestBucket(8, 11), ManifestBucket(8, 22)), updates_vision=False)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def policy(engine: ScriptedEngine) -> PolicyState:
    policy = PolicyState(engine)  # type: ignore[arg-type]
    policy.loaded(standalone=False)
    return policy


async def _serve(policy: PolicyState, version: int, run_id: str = "a", epoch: int = 1) -> None:
    await policy.open_epoch(spec(run_id, epoch))
    await policy.stage(run_id, epoch, manifest(version), 5)
    await policy.commit(run_id, epoch, version, 5)


async def _running(*coroutines: Any) -> list[asyncio.Task[Any]]:
    """Start coroutines and let them come to where they wait."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    for _ in range(10):
        await asyncio.sleep(0)
    return tasks


async def test_life_from_loading_to_serving(engine: ScriptedEngine) -> None:
    policy = PolicyState(engine)  # type: ignore[arg-type]
    seen: list[ActorState] = []
    policy.on_change = lambda: seen.append(policy.state)
    policy.loaded(standalone=False)
    await policy.open_epoch(spec())
    checksums, receive_s = await policy.stage("a", 1, manifest(3), 5)
    assert checksums == (11, 22)
    assert 0 <= receive_s < 1
    assert (policy.policy_version, policy.staged_version) == (0, 3)
    assert await policy.commit("a", 1, 3, 5) == 0.5
    assert (policy.policy_version, policy.staged_version, policy.run_id, policy.epoch) == (3, -1, "a", 1)
    policy.drain()
    assert seen == [ActorState.PENDING_WEIGHTS, ActorState.SERVING, ActorState.DRAINING]
    assert engine.calls == ["leave", "open a1", "stage 3", "commit 3"]


async def test_standalone_serves_version_0_until_a_learner_comes(engine: ScriptedEngine) -> None:
    policy = PolicyState(engine)  # type: ignore[arg-type]
    policy.loaded(standalone=True)
    assert (policy.state, policy.policy_version) == (ActorState.SERVING, 0)
    await policy.open_epoch(spec())
    assert policy.state is ActorState.PENDING_WEIGHTS


async def test_calls_of_another_run_or_epoch_are_stale(policy: PolicyState) -> None:
    with pytest.raises(StaleEpoch):
        await policy.stage("a", 1, manifest(1), 5)
    await _serve(policy, 1, epoch=4)
    for run_id, epoch in (("b", 4), ("a", 3), ("a", 5)):
        with pytest.raises(StaleEpoch):
            await policy.stage(run_id, epoch, manifest(2), 5)
        with pytest.raises(StaleEpoch):
            await policy.commit(run_id, epoch, 2, 5)
        with pytest.raises(StaleEpoch):
            await policy.abort(run_id, epoch)
    for epoch in (3, 4):
        with pytest.raises(StaleEpoch, match="is not after epoch 4"):
            await policy.open_epoch(spec("a", epoch))
    assert (policy.state, policy.policy_version) == (ActorState.SERVING, 1)


async def test_a_new_run_takes_over_and_the_old_one_cannot_come_back(policy: PolicyState) -> None:
    await _serve(policy, 57, epoch=9)
    await policy.open_epoch(spec("b", 1))
    assert (policy.state, policy.run_id, policy.epoch) == (ActorState.PENDING_WEIGHTS, "b", 1)
    with pytest.raises(StaleEpoch, match="run a has been replaced by run b"):
        await policy.open_epoch(spec("a", 10))
    # A resumed learner is at its checkpoint's version, below the one that was served.
    await policy.stage("b", 1, manifest(50), 5)
    await policy.commit("b", 1, 50, 5)
    assert (policy.state, policy.policy_version) == (ActorState.SERVING, 50)


async def test_versions_of_one_run_do_not_go_back(policy: PolicyState) -> None:
    await _serve(policy, 5)
    with pytest.raises(InvalidRequest, match=r"manifest\.policy_version: is 4; 5 is served already"):
        await policy.stage("a", 1, manifest(4), 5)
    await policy.stage("a", 1, manifest(5), 5)  # again, as after a lost answer


async def test_a_corrupt_stage_touches_nothing_and_ends_the_epoch(engine: ScriptedEngine, policy: PolicyState) -> None:
    await _serve(policy, 1)
    engine.checksums = (11, 23)
    with pytest.raises(StageCorrupt, match=r"checksum of bucket\(s\) \[1\]"):
        await policy.stage("a", 1, manifest(2), 5)
    assert (policy.state, policy.policy_version, policy.staged_version) == (ActorState.SERVING, 1, -1)
    with pytest.raises(NotStaged):
        await policy.commit("a", 1, 2, 5)
    with pytest.raises(StaleEpoch, match="not open"):
        await policy.stage("a", 1, manifest(2), 5)
    assert engine.calls[-2:] == ["stage 2", "leave"]


async def test_missing_checksums_are_corrupt(engine: ScriptedEngine, policy: PolicyState) -> None:
    await policy.open_epoch(spec())
    engine.checksums = (11,)
    with pytest.raises(StageCorrupt):
        await policy.stage("a", 1, manifest(1), 5)


async def test_what_the_manifest_does_not_know_is_told(engine: ScriptedEngine, policy: PolicyState) -> None:
    await policy.open_epoch(spec())
    engine.checksums = (33, 22)
    asked = manifest(1)
    asked = dataclasses.replace(asked, buckets=(dataclasses.replace(asked.buckets[0], xxh3=None), asked.buckets[1]))
    checksums, _ = await policy.stage("a", 1, asked, 5)
    assert checksums == (33, 22)


@pytest.mark.parametrize("how", ["engine", "clock"])
async def test_a_late_stage_leaves_the_epoch(engine: ScriptedEngine, policy: PolicyState, how: str) -> None:
    await _serve(policy, 1)
    if how == "engine":
        engine.error["stage"] = StageTimeout("peers are gone")
    else:
        engine.hold["stage"] = asyncio.Event()
    with pytest.raises(StageTimeout):
        await policy.stage("a", 1, manifest(2), 0.05)
    assert (policy.state, policy.policy_version) == (ActorState.SERVING, 1)
    assert engine.calls[-1] == "leave"


async def test_a_failed_rendezvous_can_be_followed_by_the_next_epoch(
    engine: ScriptedEngine, policy: PolicyState
) -> None:
    engine.error["open"] = StageTimeout("a member is missing")
    with pytest.raises(StageTimeout):
        await policy.open_epoch(spec("a", 1))
    engine.error.clear()
    await _serve(policy, 1, epoch=2)
    assert (policy.state, policy.epoch) == (ActorState.SERVING, 2)


@pytest.mark.parametrize("operation", ["open", "stage"])
async def test_abort_interrupts_what_waits(engine: ScriptedEngine, policy: PolicyState, operation: str) -> None:
    engine.hold[operation] = asyncio.Event()
    if operation == "stage":
        await policy.open_epoch(spec())
        [waiting] = await _running(policy.stage("a", 1, manifest(1), 60))
    else:
        [waiting] = await _running(policy.open_epoch(spec(timeout_s=60)))
    await policy.abort("a", 1)
    with pytest.raises(StaleEpoch, match="aborted"):
        await waiting
    assert engine.calls.count("leave") >= 1
    await policy.abort("a", 1)  # idempotent
    with pytest.raises(StaleEpoch):
        await policy.stage("a", 1, manifest(1), 5)


async def test_the_next_epoch_interrupts_a_stuck_one(engine: ScriptedEngine, policy: PolicyState) -> None:
    await policy.open_epoch(spec("a", 1))
    engine.hold["stage"] = asyncio.Event()
    [waiting] = await _running(policy.stage("a", 1, manifest(1), 60))
    await policy.open_epoch(spec("a", 2))
    with pytest.raises(StaleEpoch):
        await waiting
    del engine.hold["stage"]
    await policy.stage("a", 2, manifest(1), 5)
    assert policy.staged_version == 1


async def test_a_caller_that_leaves_takes_its_stage_along(engine: ScriptedEngine, policy: PolicyState) -> None:
    await policy.open_epoch(spec())
    engine.hold["stage"] = asyncio.Event()
    [waiting] = await _running(policy.stage("a", 1, manifest(1), 60))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert engine.calls[-1] == "leave"
    await policy.open_epoch(spec("a", 2))  # the lock is free


async def test_a_commit_outlives_its_caller_and_can_be_asked_for_again(
    engine: ScriptedEngine, policy: PolicyState
) -> None:
    await policy.open_epoch(spec())
    await policy.stage("a", 1, manifest(1), 5)
    engine.hold["commit"] = asyncio.Event()
    [first] = await _running(policy.commit("a", 1, 1, 60))
    first.cancel()
    with pytest.raises(StageTimeout):
        await policy.commit("a", 1, 1, 0.01)
    [second, abort] = await _running(policy.commit("a", 1, 1, 60), policy.abort("a", 1))
    assert not abort.done()  # nothing interrupts a commit
    engine.hold["commit"].set()
    assert await second == 0.5
    await abort
    assert await policy.commit("a", 1, 1, 5) == 0.5
    assert (policy.state, policy.policy_version) == (ActorState.SERVING, 1)
    assert engine.calls.count("commit 1") == 1


async def test_a_version_that_is_staged_again_goes_live_again(engine: ScriptedEngine, policy: PolicyState) -> None:
    await _serve(policy, 1)
    await policy.stage("a", 1, manifest(1), 5)
    assert await policy.commit("a", 1, 1, 5) == 0.5
    assert engine.calls.count("commit 1") == 2
    assert policy.staged_version == -1


async def test_a_commit_that_failed_can_be_asked_for_again(policy: PolicyState) -> None:
    await policy.open_epoch(spec())
    with pytest.raises(NotStaged):
        await policy.commit("a", 1, 1, 5)
    await policy.stage("a", 1, manifest(1), 5)
    assert await policy.commit("a", 1, 1, 5) == 0.5


async def test_a_commit_that_a_new_run_overtakes_serves_nobody(engine: ScriptedEngine, policy: PolicyState) -> None:
    await _serve(policy, 1)
    await policy.stage("a", 1, manifest(2), 5)
    engine.hold["commit"] = asyncio.Event()
    [commit] = await _running(policy.commit("a", 1, 2, 5))
    [opening] = await _running(policy.open_epoch(spec("b")))
    engine.hold["commit"].set()
    with pytest.raises(StaleEpoch, match="run a is not the one that this actor follows"):
        await commit
    await opening
    assert policy.state is ActorState.PENDING_WEIGHTS
    await policy.stage("b", 1, manifest(0), 5)
    assert await policy.commit("b", 1, 0, 5) == 0.5
    assert (policy.state, policy.policy_version) == (ActorState.SERVING, 0)


async def test_commit_of_what_is_not_staged(policy: PolicyState) -> None:
    await policy.open_epoch(spec())
    with pytest.raises(NotStaged, match="nothing is staged"):
        await policy.commit("a", 1, 1, 5)
    await policy.stage("a", 1, manifest(1), 5)
    with pytest.raises(NotStaged, match="version 1 is staged"):
        await policy.commit("a", 1, 2, 5)
    await policy.commit("a", 1, 1, 5)


async def test_a_broken_commit_fails_the_actor(engine: ScriptedEngine, policy: PolicyState) -> None:
    await policy.open_epoch(spec())
    await policy.stage("a", 1, manifest(1), 5)
    engine.error["commit"] = RuntimeError("half of it is in")
    with pytest.raises(RuntimeError):
        await policy.commit("a", 1, 1, 5)
    assert policy.state is ActorState.FAILED
    with pytest.raises(EngineDead):
        await policy.open_epoch(spec("a", 2))
    policy.drain()
    assert policy.state is ActorState.FAILED


async def test_a_draining_actor_takes_no_weights(policy: PolicyState) -> None:
    await policy.open_epoch(spec())
    await policy.stage("a", 1, manifest(1), 5)
    policy.drain()
    with pytest.raises(Draining):
        await policy.commit("a", 1, 1, 5)
    with pytest.raises(Draining):
        await policy.stage("a", 1, manifest(1), 5)
    with pytest.raises(Draining):
        await policy.open_epoch(spec("a", 2))
    await policy.abort("a", 1)


async def test_half_a_policy_is_never_let_go_on(policy: PolicyState, engine: ScriptedEngine) -> None:
    """Not by the end of a pause, not by an operator, not by SIGTERM."""
    await _serve(policy, 1)
    await policy.pause(timeout_s=0.05)
    engine.error["commit"] = RuntimeError("a worker died in the middle")
    await policy.stage("a", 1, manifest(2), 5)
    with pytest.raises(RuntimeError):
        await policy.commit("a", 1, 2, 5)
    assert policy.state is ActorState.FAILED
    with pytest.raises(EngineDead):
        await policy.resume()
    await asyncio.sleep(0.1)
    assert "resume" not in engine.calls


async def _left(engine: ScriptedEngine, operation: str, call: Any) -> None:
    """The caller leaves while the engine is at it."""
    engine.hold[operation] = asyncio.Event()
    [task] = await _running(call)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    engine.hold[operation].set()


async def test_a_pause_outlives_its_caller_and_ends_by_its_limit(policy: PolicyState, engine: ScriptedEngine) -> None:
    await _serve(policy, 1)
    async with asyncio.timeout(10):
        await _left(engine, "pause", policy.pause(timeout_s=0.05))
        await until(lambda: policy.state is ActorState.PAUSED)
        await until(lambda: policy.state is ActorState.SERVING)
        await policy.pause(timeout_s=60)
        await _left(engine, "pause", policy.pause(timeout_s=0.05))  # counted anew
        await until(lambda: policy.state is ActorState.SERVING)
    assert engine.calls[-5:] == ["pause", "resume", "pause", "pause", "resume"]


async def test_a_resume_outlives_its_caller(policy: PolicyState, engine: ScriptedEngine) -> None:
    await _serve(policy, 1)
    await policy.pause(timeout_s=60)
    async with asyncio.timeout(10):
        await _left(engine, "resume", policy.resume())
        await until(lambda: policy.state is ActorState.SERVING)
