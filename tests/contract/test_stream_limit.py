"""How many streams one caller may have open."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from common import wire
from common.client import GrpcClient
from common.errors import QueueFull, TooManyStreams
from common.pb.rollout.v1.rollout_pb2_grpc import RolloutServiceStub
from common.rpc import interceptors
from common.rpc.peers import StreamLimit
from common.types import ActorState, RolloutRequest, SamplingParams, TextPrompt
from tests.helpers.fake_actors import StartActor
from tests.helpers.fakes import until

REQUEST = RolloutRequest("g", TextPrompt("hello"), (), SamplingParams(max_tokens=2))


async def test_more_connections_bring_no_more_streams(start_actor: StartActor) -> None:
    """Refused at once, with a time to come again; calls that are no streams go through; what ends makes room."""
    actor = await start_actor(fake={"first_token_s": 60.0}, limits={"max_streams_per_peer": 3})
    clients = [GrpcClient(actor.address) for _ in range(4)]
    open_streams = [asyncio.create_task(client.generate(REQUEST, timeout_s=60)) for client in clients[:3]]
    await until(lambda: actor.engine.load().num_running == 3)
    for refused in (clients[3].generate(REQUEST, timeout_s=10), clients[0].put_media([b"x"])):
        with pytest.raises(TooManyStreams, match="3 streams of this caller are open, the most") as full:
            await refused
        assert full.value.retry_after_s == 0.5
        assert isinstance(full.value, QueueFull)  # those who know that one wait and come again
    status = await clients[3].status()
    assert (status.state, status.num_running) == (ActorState.SERVING, 3)
    open_streams[0].cancel()
    await until(lambda: actor.engine.load().num_running == 2)
    again = asyncio.create_task(clients[3].generate(REQUEST, timeout_s=60))
    await until(lambda: actor.engine.load().num_running == 3)
    for task in (*open_streams, again):
        task.cancel()
    await asyncio.gather(*open_streams, again, return_exceptions=True)
    for client in clients:
        await client.close()


async def test_on_one_connection_too(start_actor: StartActor) -> None:
    """gRPC's own bound on a connection refuses without a word: ours answers before that."""
    actor = await start_actor(fake={"first_token_s": 60.0}, limits={"max_streams_per_peer": 2})
    client = GrpcClient(actor.address)
    tasks = [asyncio.create_task(client.generate(REQUEST, timeout_s=60)) for _ in range(20)]
    await until(lambda: sum(task.done() for task in tasks) == 18)
    assert all(isinstance(task.exception(), TooManyStreams) for task in tasks if task.done())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()


async def test_however_many_come_at_once(start_actor: StartActor) -> None:
    """Beyond gRPC's own bound each would be refused as if nobody were there, and a poll of the state too."""
    actor = await start_actor(fake={"first_token_s": 60.0}, limits={"max_streams_per_peer": 30})
    client = GrpcClient(actor.address)
    tasks = [asyncio.create_task(client.generate(REQUEST, timeout_s=60)) for _ in range(150)]
    statuses = [await client.status() for _ in range(5)]
    assert {status.state for status in statuses} == {ActorState.SERVING}
    await until(lambda: sum(task.done() for task in tasks) == 120)
    assert {type(task.exception()) for task in tasks if task.done()} == {TooManyStreams}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()


def test_callers_do_not_share_a_limit() -> None:
    limit = StreamLimit(1)
    learner, reader, other = (
        ("ipv4:10.0.0.1", frozenset({"learner.outrider"})),
        ("ipv4:10.0.0.1", frozenset({"reader.outrider"})),
        ("ipv4:10.0.0.2", frozenset({"learner.outrider"})),
    )
    with limit.stream(learner), limit.stream(reader), limit.stream(other):
        for peer in (learner, reader, other):
            with pytest.raises(TooManyStreams), limit.stream(peer):
                pass
    with limit.stream(learner):
        pass
    assert not limit._open  # nobody is remembered who has left


async def test_a_caller_that_does_not_take_its_answer_gives_its_place_back(
    start_actor: StartActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a deadline of its own it would hold it for ever: it is alive, and the connection is."""
    monkeypatch.setattr(interceptors, "_TAKE_S", 0.5)
    fake = {"token_s": 0, "max_context_tokens": 4096}
    actor = await start_actor(fake=fake, limits={"max_queued_completions": 64})
    large = SamplingParams(n=64, ignore_eos=True, max_tokens=4000, top_logprobs=16)
    channel = grpc.aio.insecure_channel(actor.address)  # ours would give the call a deadline
    stalled: Any = RolloutServiceStub(channel).Generate(  # type: ignore[no-untyped-call]
        wire.request_to_proto(RolloutRequest("g", TextPrompt("x"), (), large))
    )
    await stalled.read()  # of some hundred KiB, of many: the others do not fit into what a connection holds
    async with asyncio.timeout(20):
        await actor.server._rollouts.idle.wait()
    client = GrpcClient(actor.address)
    group = await client.generate(RolloutRequest("h", TextPrompt("x"), (), SamplingParams(n=64)), timeout_s=10)
    assert len(group.completions) == 64
    with pytest.raises(grpc.aio.AioRpcError) as late:  # after what was on its way
        _ = [response async for response in _rest(stalled)]
    assert (late.value.code(), late.value.details()) == (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "a response was not taken for 0.5 s",
    )
    await channel.close()
    await client.close()


async def _rest(call: Any) -> AsyncIterator[Any]:
    while (response := await call.read()) != grpc.aio.EOF:  # type: ignore[attr-defined]
        yield response
