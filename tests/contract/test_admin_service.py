"""`admin.v1` over a real socket: a pause is seen by everyone, keeps what runs, and ends."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import errors
from common.errors import OutriderError, from_rpc_error
from common.pb.admin.v1 import admin_pb2 as pb
from common.pb.rollout.v1 import rollout_pb2
from common.pb.weights.v1 import weights_pb2
from tests.helpers.fake_actors import FakeActor, StartActor
from tests.helpers.fakes import until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _request(n: int = 2) -> rollout_pb2.GenerateRequest:
    sampling = rollout_pb2.SamplingParams(n=n, max_tokens=4, ignore_eos=True)
    return rollout_pb2.GenerateRequest(group_id="g", text="hello", sampling=sampling)


async def _num_completions(call: Any) -> int:
    return sum([len(response.completions.items) async for response in call])


async def _error(call: Any) -> OutriderError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return from_rpc_error(raised.value)


async def _state(actor: FakeActor) -> str:
    status = await actor.weights.GetStatus(weights_pb2.GetStatusRequest())
    return weights_pb2.ActorState.Name(status.state)


async def _await_readiness(actor: FakeActor, wanted: Any) -> None:
    """Returns when the readiness that a Watch reports is `wanted`."""
    watch = health_pb2_grpc.HealthStub(actor.channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
    async for answer in watch:
        if answer.status == wanted:
            watch.cancel()
            return


async def test_what_runs_stands_still_and_goes_on(start_actor: StartActor) -> None:
    actor = await start_actor(fake={"token_s": 0.001})
    group = asyncio.create_task(_num_completions(actor.rollouts.Generate(_request(n=3))))
    await until(lambda: actor.engine.load().num_running == 3)
    await actor.server.policy.pause(timeout_s=600)  # before anything can finish; by a call it might be too late
    paused = await actor.admin.Pause(pb.PauseRequest())
    assert (paused.num_running, paused.num_waiting) == (3, 0)
    assert await _state(actor) == "ACTOR_STATE_PAUSED"
    await _await_readiness(actor, NOT_SERVING)
    liveness = await health_pb2_grpc.HealthStub(actor.channel).Check(health_pb2.HealthCheckRequest(service="liveness"))
    assert liveness.status == SERVING
    refused = await _error(_num_completions(actor.rollouts.Generate(_request())))
    assert isinstance(refused, errors.Paused)
    assert not group.done()
    await actor.admin.Resume(pb.ResumeRequest())
    assert await group == 3
    assert await _state(actor) == "ACTOR_STATE_SERVING"
    await _await_readiness(actor, SERVING)
    assert await _num_completions(actor.rollouts.Generate(_request())) == 2


async def test_a_forgotten_pause_ends_by_itself(start_actor: StartActor) -> None:
    actor = await start_actor()
    await actor.admin.Pause(pb.PauseRequest(timeout_ms=3_600_000))
    await actor.admin.Pause(pb.PauseRequest(timeout_ms=1))  # counted anew
    await _await_readiness(actor, SERVING)
    assert await _state(actor) == "ACTOR_STATE_SERVING"
    assert await _num_completions(actor.rollouts.Generate(_request())) == 2


async def test_resume_without_a_pause_is_fine(start_actor: StartActor) -> None:
    actor = await start_actor()
    await actor.admin.Resume(pb.ResumeRequest())
    assert await _state(actor) == "ACTOR_STATE_SERVING"


async def test_no_pause_is_longer_than_an_hour(start_actor: StartActor) -> None:
    actor = await start_actor()
    refused = await _error(actor.admin.Pause(pb.PauseRequest(timeout_ms=3_600_001)))
    assert isinstance(refused, errors.InvalidRequest)
    assert refused.field == "timeout_ms"
    assert await _state(actor) == "ACTOR_STATE_SERVING"


async def test_an_actor_that_waits_for_weights_still_says_so(start_actor: StartActor) -> None:
    actor = await start_actor(standalone=False)
    await actor.admin.Pause(pb.PauseRequest())
    assert await _state(actor) == "ACTOR_STATE_PENDING_WEIGHTS"


async def test_a_drain_lets_paused_groups_finish(start_actor: StartActor) -> None:
    actor = await start_actor(fake={"token_s": 0.001})
    group = asyncio.create_task(_num_completions(actor.rollouts.Generate(_request(n=3))))
    await until(lambda: actor.engine.load().num_running == 3)
    await actor.server.policy.pause(timeout_s=600)
    await actor.server.stop(grace_s=30)
    assert await group == 3


async def test_a_draining_actor_is_not_paused(start_actor: StartActor) -> None:
    actor = await start_actor()
    actor.server.policy.drain()
    assert isinstance(await _error(actor.admin.Pause(pb.PauseRequest())), errors.Draining)


async def test_an_engine_that_does_not_answer_holds_up_no_end(start_actor: StartActor) -> None:
    """SIGTERM ends an operator's pause, but waits for that no longer than for groups."""
    actor = await start_actor()
    await actor.admin.Pause(pb.PauseRequest())
    answers = asyncio.Event()
    resume, actor.engine.resume = actor.engine.resume, answers.wait  # type: ignore[method-assign, assignment]
    try:
        forced = asyncio.Event()
        forced.set()
        async with asyncio.timeout(10):
            await actor.server.stop(60.0, forced)
    finally:
        actor.engine.resume = resume  # type: ignore[method-assign]
