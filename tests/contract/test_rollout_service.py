"""`rollout.v1` over a real socket, with the fake engine."""

import asyncio
import hashlib
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest

from common import errors
from common.errors import OutriderError, from_rpc_error
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.types import ActorState
from tests.helpers.fake_actors import StartActor, png

ROOT = Path(__file__).resolve().parents[2]
FAST = {"token_s": 0.0}
SLOW = {"token_s": 1.0}


def _request(group_id: str = "g", n: int = 4, **values: Any) -> pb.GenerateRequest:
    values = {"text": "hello", "sampling": pb.SamplingParams(n=n, max_tokens=16, seed=1)} | values
    return pb.GenerateRequest(group_id=group_id, **values)


def _slow_request(n: int = 4) -> pb.GenerateRequest:
    return _request(n=n, sampling=pb.SamplingParams(n=n, max_tokens=64, ignore_eos=True))


def _image(data: bytes | None = None, sha256: bytes = b"") -> pb.MediaItem:
    item = pb.MediaItem(modality=pb.MODALITY_IMAGE, sha256=sha256)
    if data is not None:
        item.encoded = data
    return item


async def _events(call: Any) -> list[pb.GenerateResponse]:
    return [event async for event in call]


async def _error(call: Awaitable[Any]) -> OutriderError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return from_rpc_error(raised.value)


async def _wait_until(condition: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for on the other side of a socket
            await asyncio.sleep(0.01)


async def test_a_group(start_actor: StartActor) -> None:
    actor = await start_actor(fake={"token_s": 0.0, "tokens_per_image": 3})
    data = png(1)
    message = pb.ChatMessage(role="u", parts=[pb.ChatPart(media_index=0), pb.ChatPart(text="a")])
    request = _request(n=8, chat=pb.ChatPrompt(messages=[message]), media=[_image(data)])
    request.returns.text = True
    first, *rest = await _events(actor.rollouts.Generate(request))
    info = first.prompt
    assert (info.group_id, info.actor_id) == ("g", "actor-1")
    # The fake engine: one id per byte, 1 is the placeholder.
    assert list(info.unexpanded_ids) == [2 + ord("u"), 1, 2 + ord("a")]
    assert list(info.expanded_ids) == [2 + ord("u"), 1, 1, 1, 2 + ord("a")]
    [use] = info.media
    assert (use.sha256, use.placeholder.offset, use.placeholder.length) == (hashlib.sha256(data).digest(), 1, 3)
    assert list(info.suppressed_token_ids) == [1]
    items = [item for event in rest for item in event.completions.items]
    assert sorted(item.index for item in items) == list(range(8))
    assert len({item.trajectory_id for item in items}) == 8
    for item in items:
        assert 1 <= len(item.token_ids) == len(item.logprobs) <= 16
        assert [(span.policy_version, span.start, span.end) for span in item.version_spans] == [
            (0, 0, len(item.token_ids))
        ]
        assert len(item.text) == len(item.token_ids) - (item.finish_reason == pb.FINISH_REASON_STOP)
    # All end together, and come together.
    assert len(rest) < 8


async def test_media_cross_once(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST)
    first, second = png(1), png(2)
    hashes = [hashlib.sha256(data).digest() for data in (first, second)]
    by_hash = _request(media=[_image(sha256=sha256) for sha256 in hashes])
    missing = await _error(_events(actor.rollouts.Generate(by_hash)))
    assert isinstance(missing, errors.MediaMissing)
    assert missing.sha256s == tuple(hashes)
    mixed = _request(media=[_image(first, hashes[0]), _image(sha256=hashes[1])])
    missing = await _error(_events(actor.rollouts.Generate(mixed)))
    assert isinstance(missing, errors.MediaMissing)
    assert missing.sha256s == (hashes[1],)
    both = _request(media=[_image(first), _image(second)])
    expected = await _events(actor.rollouts.Generate(both))
    again = await _events(actor.rollouts.Generate(by_hash))
    assert again[0] == expected[0]
    assert [use.sha256 for use in again[0].prompt.media] == hashes


async def test_put_media_in_chunks(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST)
    first, second = png(1, size=64), png(2, size=200, image_format="WEBP")
    hashes = [hashlib.sha256(data).digest() for data in (first, second)]

    async def chunks() -> Any:
        for data, sha256 in zip((first, second), hashes, strict=True):
            yield pb.PutMediaRequest(sha256=sha256, num_bytes=len(data), chunk=data[:100])
            for start in range(100, len(data), 1000):
                yield pb.PutMediaRequest(chunk=data[start : start + 1000])

    response = await actor.rollouts.PutMedia(chunks())
    assert list(response.sha256) == hashes
    events = await _events(actor.rollouts.Generate(_request(media=[_image(sha256=sha256) for sha256 in hashes])))
    assert len(events[0].prompt.media) == 2


@pytest.mark.parametrize(
    ("chunks", "kind", "field"),
    [
        ([pb.PutMediaRequest(chunk=b"x")], errors.InvalidRequest, "sha256"),
        ([pb.PutMediaRequest(sha256=b"x", num_bytes=1)], errors.InvalidRequest, "sha256"),
        ([pb.PutMediaRequest(sha256=bytes(32), num_bytes=2, chunk=b"x")], errors.InvalidRequest, "num_bytes"),
        ([pb.PutMediaRequest(sha256=bytes(32), num_bytes=1, chunk=b"xx")], errors.InvalidRequest, "chunk"),
        ([pb.PutMediaRequest(sha256=bytes(32), num_bytes=1, chunk=b"x")], errors.InvalidRequest, "sha256"),
        (
            [pb.PutMediaRequest(sha256=hashlib.sha256(b"x").digest(), num_bytes=1, chunk=b"x")],
            errors.InvalidRequest,
            "chunk",
        ),
        ([pb.PutMediaRequest(sha256=bytes(32), num_bytes=2**40)], errors.TooLarge, "num_bytes"),
        (
            [pb.PutMediaRequest(sha256=bytes(32), num_bytes=2**21, chunk=bytes(2**20 + 1))],
            errors.TooLarge,
            "chunk",
        ),
    ],
)
async def test_bad_uploads_keep_nothing(
    start_actor: StartActor, chunks: list[pb.PutMediaRequest], kind: type[OutriderError], field: str
) -> None:
    actor = await start_actor(fake=FAST)
    error = await _error(actor.rollouts.PutMedia(iter(chunks)))
    assert type(error) is kind
    assert error.field == field  # type: ignore[attr-defined]
    lookup = await _error(_events(actor.rollouts.Generate(_request(media=[_image(sha256=bytes(32))]))))
    assert isinstance(lookup, errors.MediaMissing)


@pytest.mark.parametrize(
    ("values", "kind", "problem"),
    [
        ({"group_id": ""}, errors.InvalidRequest, "group_id: must have 1 to 128 characters"),
        ({"n": 257}, errors.InvalidRequest, "sampling.n: is 257; must be 1 to 256"),
        (
            {"media": [_image(png(1), bytes(32))]},
            errors.InvalidRequest,
            f"media[0].sha256: is {'00' * 32}, but the bytes hash to {hashlib.sha256(png(1)).hexdigest()}",
        ),
        (
            {"media": [_image(png(1)), _image(b"no image")]},
            errors.InvalidRequest,
            "media[1].encoded: not an image in PNG, JPEG or WebP format",
        ),
        (
            {"media": [_image(png(1, size=65))]},
            errors.TooLarge,
            "media[0].encoded: 65x65 pixels, more than the limit of 4096",
        ),
        (
            {"returns": pb.ReturnOptions(routed_experts=True)},
            errors.Unimplemented,
            "returns.routed_experts: the fake engine has no experts",
        ),
    ],
)
async def test_bad_requests_name_the_field(
    start_actor: StartActor, values: dict[str, Any], kind: type[OutriderError], problem: str
) -> None:
    actor = await start_actor(fake=FAST, limits={"max_media_pixels": 64 * 64})
    error = await _error(_events(actor.rollouts.Generate(_request(**values))))
    assert type(error) is kind
    assert str(error) == problem
    # It goes on as before.
    assert len(await _events(actor.rollouts.Generate(_request()))) >= 2


async def test_a_message_over_the_limit(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST, limits={"max_message_bytes": 2**21})
    error = await _error(_events(actor.rollouts.Generate(_request(media=[_image(bytes(2**21))]))))
    assert isinstance(error, errors.TooLarge)


async def test_a_bug_is_an_id_and_no_traceback(start_actor: StartActor, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = await start_actor(fake=FAST)

    def broken(request: Any) -> Any:
        raise KeyError("/secret/path")

    monkeypatch.setattr(actor.engine._prompts, "understand", broken)
    error = await _error(_events(actor.rollouts.Generate(_request())))
    assert type(error) is errors.Internal
    assert "secret" not in str(error)
    assert str(error).startswith("internal error; the server's log has it under ")


async def test_cancelling_frees_the_engine(start_actor: StartActor) -> None:
    actor = await start_actor(fake=SLOW)
    call = actor.rollouts.Generate(_slow_request(n=6))
    first = await call.read()
    assert first.HasField("prompt")
    await _wait_until(lambda: actor.engine.load().num_running == 6)
    call.cancel()
    await _wait_until(lambda: actor.engine.load().num_running == 0, timeout_s=1.0)


async def test_a_deadline_frees_the_engine(start_actor: StartActor) -> None:
    actor = await start_actor(fake=SLOW)
    error = await _error(_events(actor.rollouts.Generate(_slow_request(), timeout=0.3)))
    assert isinstance(error, errors.DeadlineExceeded)
    await _wait_until(lambda: actor.engine.load().num_running == 0, timeout_s=1.0)


CLIENT = """
import sys, grpc
from common.pb.rollout.v1 import rollout_pb2 as pb, rollout_pb2_grpc
request = pb.GenerateRequest(group_id="g", text="x", sampling=pb.SamplingParams(max_tokens=64, ignore_eos=True))
for _ in rollout_pb2_grpc.RolloutServiceStub(grpc.insecure_channel(sys.argv[1])).Generate(request):
    pass
"""


async def test_a_client_that_is_killed_frees_the_engine(start_actor: StartActor) -> None:
    actor = await start_actor(fake=SLOW)
    client = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, actor.address, cwd=ROOT)
    await _wait_until(lambda: actor.engine.load().num_running == 1, timeout_s=20)
    client.kill()
    await client.wait()
    await _wait_until(lambda: actor.engine.load().num_running == 0, timeout_s=2.0)


async def test_the_queue_is_bounded(start_actor: StartActor) -> None:
    actor = await start_actor(fake=SLOW, limits={"max_queued_completions": 8})
    call = actor.rollouts.Generate(_slow_request(n=6))
    await call.read()
    error = await _error(_events(actor.rollouts.Generate(_slow_request(n=3))))
    assert isinstance(error, errors.QueueFull)
    assert error.retry_after_s == 0.5
    assert str(error) == "6 completions run or wait; the limit is 8"
    fits = actor.rollouts.Generate(_slow_request(n=2))
    assert (await fits.read()).HasField("prompt")
    call.cancel()
    await _wait_until(lambda: actor.engine.load().num_running == 2)
    again = actor.rollouts.Generate(_slow_request(n=6))
    assert (await again.read()).HasField("prompt")
    again.cancel()
    fits.cancel()


async def test_only_a_serving_actor_takes_rollouts(start_actor: StartActor) -> None:
    actor = await start_actor(standalone=False, fake=FAST)
    pending = await _error(_events(actor.rollouts.Generate(_request())))
    assert isinstance(pending, errors.WeightsPending)
    actor.server.policy._become(ActorState.SERVING)
    await _events(actor.rollouts.Generate(_request(min_policy_version=0)))
    behind = await _error(_events(actor.rollouts.Generate(_request(min_policy_version=1))))
    assert isinstance(behind, errors.WeightsPending)
    assert str(behind) == "policy version 0 is served, not yet 1"
    actor.server.policy.drain()
    draining = await _error(_events(actor.rollouts.Generate(_request())))
    assert isinstance(draining, errors.Draining)


async def test_a_dead_engine_is_said_to_be_dead(start_actor: StartActor) -> None:
    actor = await start_actor(fake={"token_s": 0.0, "die_at_group": 2})
    await _events(actor.rollouts.Generate(_request()))
    for _ in range(2):
        assert isinstance(await _error(_events(actor.rollouts.Generate(_request()))), errors.EngineDead)
    async with asyncio.timeout(5):
        await actor.server.failed.wait()
    assert isinstance(await _error(_events(actor.rollouts.Generate(_request()))), errors.EngineDead)


async def test_server_info(start_actor: StartActor) -> None:
    actor = await start_actor(fake={"max_context_tokens": 99, "max_images": 3}, limits={"max_group_size": 7})
    info = await actor.rollouts.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.actor_id, info.engine, info.model, info.policy_version) == ("actor-1", "fake", "fake", 0)
    assert (info.limits.max_context_tokens, info.limits.max_media_items, info.limits.max_group_size) == (99, 3, 7)


async def test_large_groups_come_in_bounded_messages(start_actor: StartActor) -> None:
    actor = await start_actor(fake={"token_s": 0.0, "max_context_tokens": 20_000})
    sampling = pb.SamplingParams(n=4, max_tokens=15_000, ignore_eos=True)
    events = await _events(actor.rollouts.Generate(_request(sampling=sampling)))
    counts = [len(event.completions.items) for event in events[1:]]
    assert sum(counts) == 4
    assert max(counts) <= 2  # 2 * 15,000 tokens fit into 2^15, 3 do not
