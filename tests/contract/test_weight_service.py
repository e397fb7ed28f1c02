"""`weights.v1` over a real socket: a real broadcast over Gloo into the fake engine."""

import asyncio
import dataclasses
import socket
import threading
from typing import Any

import grpc
import pytest
import torch
import torch.distributed as dist
import xxhash

from common import errors
from common.collective import BroadcastGroup
from common.errors import OutriderError, from_rpc_error
from common.pb.rollout.v1 import rollout_pb2
from common.pb.weights.v1 import weights_pb2 as pb
from common.types import EpochSpec, Manifest, ManifestBucket, ManifestParameter
from common.wire import epoch_to_proto, manifest_to_proto
from tests.helpers.fake_actors import FakeActor, StartActor
from tests.helpers.fakes import until
from tests.helpers.launched import free_ports
from tests.helpers.scrape import scrape

VALUES = torch.arange(6, dtype=torch.float32)


def _manifest(version: int, xxh3: int | None = None) -> Manifest:
    parameter = ManifestParameter("w", "F32", (2, 3), bucket=0, offset=0)
    checksum = xxhash.xxh3_64_intdigest(VALUES.numpy().tobytes()) if xxh3 is None else xxh3
    return Manifest(version, (parameter,), (ManifestBucket(24, checksum),), updates_vision=False)


class Learner:
    """Rank 0 of the epochs that it opens."""

    def __init__(self, actor: FakeActor, num_workers: int = 1) -> None:
        self.weights = actor.weights
        self.num_workers = num_workers
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.group: BroadcastGroup | None = None

    def spec(self, epoch: int, run_id: str = "run", timeout_s: float = 10.0) -> EpochSpec:
        return EpochSpec(run_id, epoch, "127.0.0.1", self.store.port, 1 + self.num_workers, 1, "gloo", timeout_s)

    async def open(self, epoch: int, run_id: str = "run") -> None:
        spec = self.spec(epoch, run_id)
        _, self.group = await asyncio.gather(
            self.weights.OpenEpoch(epoch_to_proto(spec)), asyncio.to_thread(BroadcastGroup, spec, 0)
        )

    async def stage(self, epoch: int, manifest: Manifest, run_id: str = "run") -> Any:
        assert self.group is not None
        buffer = VALUES.clone().view(torch.uint8)
        request = pb.StageRequest(run_id=run_id, epoch=epoch, manifest=manifest_to_proto(manifest), timeout_ms=5000)
        answers = await asyncio.gather(
            self.weights.Stage(request), asyncio.to_thread(self.group.broadcast, buffer), return_exceptions=True
        )
        if isinstance(answers[0], BaseException):
            raise answers[0]
        return answers[0]

    async def commit(self, epoch: int, version: int, run_id: str = "run") -> Any:
        return await self.weights.Commit(
            pb.CommitRequest(run_id=run_id, epoch=epoch, policy_version=version, timeout_ms=5000)
        )

    async def status(self) -> Any:
        return await self.weights.GetStatus(pb.GetStatusRequest())


async def _error(call: Any) -> OutriderError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return from_rpc_error(raised.value)


@pytest.mark.parametrize("num_workers", [1, 2])
async def test_stage_and_commit(start_actor: StartActor, num_workers: int) -> None:
    actor = await start_actor(standalone=False, fake={"token_s": 0.0, "num_workers": num_workers, "commit_s": 0.01})
    learner = Learner(actor, num_workers)
    status = await learner.status()
    assert (status.actor_id, status.state, status.num_workers) == (
        "actor-1",
        pb.ACTOR_STATE_PENDING_WEIGHTS,
        num_workers,
    )
    assert (status.run_id, status.epoch, status.staged_version) == ("", 0, -1)
    await learner.open(1)
    response = await learner.stage(1, _manifest(7))
    assert list(response.xxh3) == [xxhash.xxh3_64_intdigest(VALUES.numpy().tobytes())]
    assert (await learner.status()).staged_version == 7
    committed = await learner.commit(1, 7)
    assert committed.policy_version == 7
    assert committed.pause_s == pytest.approx(0.01)
    status = await learner.status()
    assert (status.state, status.policy_version, status.run_id, status.epoch, status.staged_version) == (
        pb.ACTOR_STATE_SERVING,
        7,
        "run",
        1,
        -1,
    )
    # A second update goes over the same epoch, and rollouts say who sampled them.
    await learner.stage(1, _manifest(8))
    await learner.commit(1, 8)
    request = rollout_pb2.GenerateRequest(group_id="g", text="hi", min_policy_version=8)
    events = [event async for event in actor.rollouts.Generate(request)]
    assert events[1].completions.items[0].version_spans[0].policy_version == 8


async def test_a_pause_is_measured_once(start_actor: StartActor) -> None:
    """Also where the learner asks for the commit again, and where it has not waited for the end."""
    port = free_ports(1)
    fake = {"token_s": 0.0, "commit_s": 0.3}
    actor = await start_actor(standalone=False, metrics_listen=f"127.0.0.1:{port}", fake=fake)
    learner = Learner(actor)
    await learner.open(1)
    await learner.stage(1, _manifest(7))
    pause_s = (await learner.commit(1, 7)).pause_s
    assert (await learner.commit(1, 7)).pause_s == pause_s
    samples = await asyncio.to_thread(scrape, port)
    assert samples["outrider_actor_policy_version"] == 7
    assert samples["outrider_actor_pause_seconds_count"] == 1
    assert samples["outrider_actor_pause_seconds_sum"] == pytest.approx(pause_s)
    assert pause_s == pytest.approx(0.3)
    await learner.stage(1, _manifest(8))
    impatient = pb.CommitRequest(run_id="run", epoch=1, policy_version=8, timeout_ms=1)
    assert isinstance(await _error(learner.weights.Commit(impatient)), errors.StageTimeout)
    await until(lambda: actor.server.policy.policy_version == 8, pause_s=0.01)
    samples = await asyncio.to_thread(scrape, port)
    assert samples["outrider_actor_policy_version"] == 8
    assert samples["outrider_actor_pause_seconds_count"] == 2
    assert samples["outrider_actor_pause_seconds_sum"] == pytest.approx(0.6)


async def test_corrupt_weights_are_never_served(start_actor: StartActor) -> None:
    actor = await start_actor(standalone=False, fake={"token_s": 0.0})
    learner = Learner(actor)
    await learner.open(1)
    await learner.stage(1, _manifest(1))
    await learner.commit(1, 1)
    error = await _error(learner.stage(1, _manifest(2, xxh3=123)))
    assert isinstance(error, errors.StageCorrupt)
    status = await learner.status()
    assert (status.state, status.policy_version, status.staged_version) == (pb.ACTOR_STATE_SERVING, 1, -1)
    assert isinstance(await _error(learner.commit(1, 2)), errors.NotStaged)
    await learner.open(2)
    await learner.stage(2, _manifest(2))
    await learner.commit(2, 2)
    assert (await learner.status()).policy_version == 2


async def test_a_learner_that_never_sends(start_actor: StartActor) -> None:
    actor = await start_actor(standalone=False)
    learner = Learner(actor)
    await learner.open(1)
    request = pb.StageRequest(run_id="run", epoch=1, manifest=manifest_to_proto(_manifest(1)), timeout_ms=200)
    assert isinstance(await _error(learner.weights.Stage(request)), errors.StageTimeout)
    assert (await learner.status()).state == pb.ACTOR_STATE_PENDING_WEIGHTS
    await learner.open(2)


async def test_abort_ends_a_waiting_stage_at_once(start_actor: StartActor) -> None:
    actor = await start_actor(standalone=False)
    learner = Learner(actor)
    await learner.open(1)
    request = pb.StageRequest(run_id="run", epoch=1, manifest=manifest_to_proto(_manifest(1)), timeout_ms=60_000)
    waiting = asyncio.ensure_future(learner.weights.Stage(request, timeout=60))
    await until(lambda: actor.server.policy._running is not None, pause_s=0.01)
    started_s = asyncio.get_running_loop().time()
    await learner.weights.Abort(pb.AbortRequest(run_id="run", epoch=1))
    assert isinstance(await _error(waiting), errors.StaleEpoch)
    assert asyncio.get_running_loop().time() - started_s < 2
    await learner.weights.Abort(pb.AbortRequest(run_id="run", epoch=1))


async def test_an_unreachable_store(start_actor: StartActor) -> None:
    actor = await start_actor(standalone=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    spec = EpochSpec("run", 1, "127.0.0.1", port, 2, 1, "gloo", 0.5)
    error = await _error(actor.weights.OpenEpoch(epoch_to_proto(spec)))
    assert isinstance(error, errors.RendezvousUnreachable)
    assert f"127.0.0.1:{port}" in str(error)


async def test_stale_calls_and_bad_fields(start_actor: StartActor) -> None:
    actor = await start_actor(standalone=False, fake={"num_workers": 2})
    learner = Learner(actor, num_workers=2)
    await learner.open(3)
    stale = await _error(learner.weights.OpenEpoch(epoch_to_proto(learner.spec(2))))
    assert isinstance(stale, errors.StaleEpoch)
    assert isinstance(await _error(learner.commit(2, 1)), errors.StaleEpoch)
    assert isinstance(await _error(learner.commit(3, 1, run_id="old")), errors.StaleEpoch)
    no_timeout = pb.CommitRequest(run_id="run", epoch=3, policy_version=1)
    assert str(await _error(learner.weights.Commit(no_timeout))) == "timeout_ms: must be positive"
    small = epoch_to_proto(learner.spec(4))
    small.world_size = 2
    assert str(await _error(learner.weights.OpenEpoch(small))) == (
        "world_size: is 2; rank 1 and 2 worker(s) do not fit"
    )


async def test_a_restarted_learner_takes_over(start_actor: StartActor) -> None:
    actor = await start_actor(standalone=False, fake={"token_s": 0.0})
    old, new = Learner(actor), Learner(actor)
    await old.open(5, "old")
    await old.stage(5, _manifest(57), "old")
    await old.commit(5, 57, "old")
    await new.open(1, "new")
    assert (await new.status()).state == pb.ACTOR_STATE_PENDING_WEIGHTS
    assert isinstance(await _error(old.commit(5, 58, "old")), errors.StaleEpoch)
    await new.stage(1, _manifest(50), "new")
    await new.commit(1, 50, "new")
    status = await new.status()
    assert (status.state, status.policy_version, status.run_id) == (pb.ACTOR_STATE_SERVING, 50, "new")


async def test_a_request_names_the_run_whose_policy_is_to_answer(start_actor: StartActor) -> None:
    """Also where another run takes the actor over before its learner knows: the group would be trained as its own."""
    actor = await start_actor(standalone=False, fake={"token_s": 0.01})
    old, new = Learner(actor), Learner(actor)

    def generate(run_id: str, max_tokens: int = 1) -> Any:
        request = rollout_pb2.GenerateRequest(group_id="g", text="hi", run_id=run_id)
        request.sampling.max_tokens = max_tokens
        request.sampling.ignore_eos = True
        return actor.rollouts.Generate(request)

    async def whole(call: Any) -> int:
        return len([event async for event in call])

    await old.open(1, "old")
    await old.stage(1, _manifest(5), "old")
    await old.commit(1, 5, "old")
    assert await whole(generate("old")) == await whole(generate("")) == 2
    under_way = generate("old", max_tokens=100)
    assert (await under_way.read()).HasField("prompt")
    await new.open(1, "new")
    await new.stage(1, _manifest(5), "new")
    await new.commit(1, 5, "new")
    spans = await _error(whole(under_way))
    assert isinstance(spans, errors.WeightsPending)
    late = await _error(whole(generate("old")))
    assert isinstance(late, errors.WeightsPending)
    assert str(spans) == str(late) == "this actor follows run new, not run old"
    assert await whole(generate("new")) == 2


async def test_requests_name_adapters(start_actor: StartActor) -> None:
    actor = await start_actor(standalone=False, fake={"token_s": 0.0, "max_lora_rank": 3})
    learner = Learner(actor)
    assert (await learner.status()).max_lora_rank == 3
    await learner.open(1)
    await learner.stage(1, _manifest(1))
    await learner.commit(1, 1)

    async def versions(model: str) -> set[int]:
        request = rollout_pb2.GenerateRequest(group_id="g", text="hi", model=model)
        events = [event async for event in actor.rollouts.Generate(request)]
        return {span.policy_version for item in events[1].completions.items for span in item.version_spans}

    refused = await _error(versions("judge"))
    assert isinstance(refused, errors.InvalidRequest)
    assert (refused.field, refused.message) == ("model", "model: 'judge' is not here; there is 'fake'")
    a = ManifestParameter("x.lora_A.weight", "F32", (3, 1), bucket=0, offset=0)
    b = ManifestParameter("x.lora_B.weight", "BF16", (1, 3), bucket=0, offset=16)
    await learner.stage(1, dataclasses.replace(_manifest(2), parameters=(a, b), adapter="judge"))
    await learner.commit(1, 2)
    info = await actor.rollouts.GetServerInfo(rollout_pb2.GetServerInfoRequest())
    assert list(info.adapters) == ["judge"]
    for model in ("judge", "fake", ""):
        assert await versions(model) == {2}
    await learner.stage(1, _manifest(3))
    await learner.commit(1, 3)
    assert isinstance(await _error(versions("judge")), errors.InvalidRequest)


async def test_a_stage_waits_for_no_thread_that_decodes_images(start_actor: StartActor) -> None:
    actor = await start_actor(standalone=False, fake={"token_s": 0.0})
    release = threading.Event()
    busy = [asyncio.create_task(asyncio.to_thread(release.wait)) for _ in range(64)]
    manifest = manifest_to_proto(dataclasses.replace(_manifest(1), parameters=()))
    request = pb.StageRequest(run_id="run", epoch=1, manifest=manifest, timeout_ms=5000)
    try:
        error = await asyncio.wait_for(_error(actor.weights.Stage(request)), 10)
    finally:
        release.set()
        await asyncio.gather(*busy)
    assert isinstance(error, errors.InvalidRequest)
    assert error.field == "manifest.parameters"
