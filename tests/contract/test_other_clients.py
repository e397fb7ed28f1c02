"""Every call of every service, by clients that share no code with this project, of an actor process."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from common import wire
from common.media import content_hash
from common.pb.admin.v1 import admin_pb2
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.pb.weights.v1 import weights_pb2
from common.rpc.tls import ACTOR, LEARNER, READER
from common.types import EpochSpec
from learner.weights.snapshot import Snapshotter
from learner.weights.transport import TorchTransport
from tests.helpers.authority import OURS, PUBLIC, Authority
from tests.helpers.fake_actors import Launch, png
from tests.helpers.launched import ROOT
from tests.helpers.other_clients import BufClient, NodeClient, OtherClient, Refused, node, require_node

FAKE = ("--engine", "fake", "--standalone", "--listen", "127.0.0.1:0", "fake.token_s=0")
ROLLOUTS, WEIGHTS, ADMIN = "rollout.v1.RolloutService", "weights.v1.WeightService", "admin.v1.AdminService"
HEALTH, REFLECTION = "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"
IMAGE = png(3, size=64)

KINDS = [pytest.param(NodeClient, id="node"), pytest.param(BufClient, id="buf", marks=pytest.mark.slow)]

Connect = Callable[..., Awaitable[OtherClient]]


@pytest.fixture
async def connect(launch: Launch, tmp_path: Path) -> AsyncIterator[Connect]:
    """A client of a new actor, in plaintext, or with a certificate for a role."""
    require_node()
    clients: list[OtherClient] = []

    async def start(kind: type[NodeClient | BufClient], role: str | None = None) -> OtherClient:
        authority = Authority(tmp_path)
        tls = (f"tls={authority.directory(ACTOR)}",) if role else ()
        actor = await launch(*FAKE, *tls)
        clients.append(kind(actor.address, authority.directory(role) if role else None))
        return clients[-1]

    yield start
    for client in clients:
        await client.close()


@pytest.mark.parametrize(
    ("kind", "role"),
    [
        pytest.param(NodeClient, LEARNER, id="node-mtls"),
        pytest.param(NodeClient, None, id="node-plaintext", marks=pytest.mark.slow),
        pytest.param(BufClient, LEARNER, id="buf-mtls", marks=pytest.mark.slow),
        pytest.param(BufClient, None, id="buf-plaintext"),
    ],
)
async def test_every_call(connect: Connect, kind: type[NodeClient | BufClient], role: str | None) -> None:
    """In the order of a learner's day; what is called is compared with what there is."""
    client = await connect(kind, role)
    called: set[str] = set()

    async def call(service: str, name: str, answer: Any, *messages: Any, take: int = 0) -> list[Any]:
        called.add(f"{service}/{name}")
        return await client.call(f"{service}/{name}", answer, *messages, take=take)

    # What there is, and what it looks like.
    listed, found = await call(
        REFLECTION,
        "ServerReflectionInfo",
        reflection_pb2.ServerReflectionResponse,
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=ROLLOUTS),
    )
    services = {service.name for service in listed.list_services_response.service}
    assert services == {ROLLOUTS, WEIGHTS, ADMIN, HEALTH, REFLECTION}
    file = descriptor_pb2.FileDescriptorProto.FromString(found.file_descriptor_response.file_descriptor_proto[0])
    assert file.name == "rollout/v1/rollout.proto"

    # Health.
    readiness = health_pb2.HealthCheckRequest(service="readiness")
    for name, take in (("Check", 0), ("Watch", 1)):
        [answer] = await call(HEALTH, name, health_pb2.HealthCheckResponse, readiness, take=take)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    # An image in chunks, then a group that names it by its hash.
    [info] = await call(ROLLOUTS, "GetServerInfo", pb.GetServerInfoResponse)
    assert (info.engine, info.limits.max_group_size) == ("fake", 256)
    sha256, half = content_hash(IMAGE), len(IMAGE) // 2
    [stored] = await call(
        ROLLOUTS,
        "PutMedia",
        pb.PutMediaResponse,
        pb.PutMediaRequest(sha256=sha256, num_bytes=len(IMAGE), chunk=IMAGE[:half]),
        pb.PutMediaRequest(chunk=IMAGE[half:]),
    )
    assert list(stored.sha256) == [sha256]
    prompt, *groups = await call(ROLLOUTS, "Generate", pb.GenerateResponse, _request())
    assert [use.sha256 for use in prompt.prompt.media] == [sha256]
    items = [item for group in groups for item in group.completions.items]
    assert sorted(item.index for item in items) == [0, 1, 2]
    assert all(len(item.token_ids) == len(item.logprobs) == 5 for item in items)

    # An operator's pause.
    await call(ADMIN, "Pause", admin_pb2.PauseResponse, admin_pb2.PauseRequest(timeout_ms=60_000))
    with pytest.raises(Refused, match="UNAVAILABLE"):
        await call(ROLLOUTS, "Generate", pb.GenerateResponse, _request())
    await call(ADMIN, "Resume", admin_pb2.ResumeResponse)

    # A weight update: the client has the control, rank 0 of the broadcast is here.
    taken = Snapshotter(torch.nn.Linear(4, 4), [], is_sender=True, bucket_bytes=2**20).take(1)
    assert taken is not None
    manifest, buffers, checksums = taken.update(full=True)
    transport = TorchTransport("127.0.0.1")
    spec = EpochSpec("run", 1, "127.0.0.1", transport.port, 2, 0, "gloo", timeout_s=30.0)
    request = wire.epoch_to_proto(spec)
    request.rank = 1
    _, sender = await asyncio.gather(
        call(WEIGHTS, "OpenEpoch", weights_pb2.OpenEpochResponse, request), transport.join(spec)
    )
    message = wire.manifest_to_proto(manifest)
    stage = weights_pb2.StageRequest(run_id="run", epoch=1, manifest=message, timeout_ms=30_000)
    [staged], _ = await asyncio.gather(
        call(WEIGHTS, "Stage", weights_pb2.StageResponse, stage), sender.send(buffers, checksums)
    )
    assert list(staged.xxh3) == [bucket.xxh3 for bucket in manifest.buckets]
    commit = weights_pb2.CommitRequest(run_id="run", epoch=1, policy_version=1, timeout_ms=30_000)
    [committed] = await call(WEIGHTS, "Commit", weights_pb2.CommitResponse, commit)
    assert committed.policy_version == 1
    await call(WEIGHTS, "Abort", weights_pb2.AbortResponse, weights_pb2.AbortRequest(run_id="run", epoch=1))
    sender.abort()
    [status] = await call(WEIGHTS, "GetStatus", weights_pb2.GetStatusResponse)
    assert (status.state, status.policy_version) == (weights_pb2.ACTOR_STATE_SERVING, 1)

    assert {name.replace("/", ".") for name in called} == {*OURS, *PUBLIC}


def _request(**sampling: Any) -> pb.GenerateRequest:
    parts = [pb.ChatPart(media_index=0), pb.ChatPart(text="What is this?")]
    return pb.GenerateRequest(
        group_id="g",
        chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", parts=parts)]),
        media=[pb.MediaItem(modality=pb.MODALITY_IMAGE, sha256=content_hash(IMAGE))],
        sampling=pb.SamplingParams(**({"n": 3, "max_tokens": 5, "ignore_eos": True} | sampling)),
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_errors_say_to_anybody_what_is_wrong(connect: Connect, kind: type[NodeClient | BufClient]) -> None:
    client = await connect(kind)
    with pytest.raises(Refused, match=r"INVALID_ARGUMENT: sampling\.n: is 1e") as refused:
        await client.call(f"{ROLLOUTS}/Generate", pb.GenerateResponse, _request(n=10**6))
    bad = _detail(refused.value, error_details_pb2.BadRequest())
    assert [violation.field for violation in bad.field_violations] == ["sampling.n"]
    with pytest.raises(Refused, match="FAILED_PRECONDITION") as refused:
        await client.call(f"{ROLLOUTS}/Generate", pb.GenerateResponse, _request())
    missing = _detail(refused.value, error_details_pb2.PreconditionFailure())
    assert [violation.subject for violation in missing.violations] == [content_hash(IMAGE).hex()]


def _detail(refused: Refused, empty: Any) -> Any:
    [detail] = [detail for detail in refused.status.details if detail.Is(empty.DESCRIPTOR)]
    detail.Unpack(empty)
    return empty


@pytest.mark.parametrize("kind", KINDS)
async def test_roles_hold_for_them(connect: Connect, kind: type[NodeClient | BufClient]) -> None:
    client = await connect(kind, READER)
    [status] = await client.call(f"{WEIGHTS}/GetStatus", weights_pb2.GetStatusResponse)
    assert status.state == weights_pb2.ACTOR_STATE_SERVING
    with pytest.raises(Refused, match=r"PERMISSION_DENIED: .*needs a certificate with the name learner\.outrider"):
        await client.call(f"{WEIGHTS}/Abort", weights_pb2.AbortResponse, weights_pb2.AbortRequest(run_id="r", epoch=1))


@pytest.mark.parametrize(
    "role", [pytest.param(None, id="plaintext", marks=pytest.mark.slow), pytest.param(READER, id="mtls")]
)
async def test_the_example_asks_about_an_image(launch: Launch, tmp_path: Path, role: str | None) -> None:
    """It prints what our own client prints of the same question, to which the fake engine has one answer."""
    require_node()
    authority = Authority(tmp_path)
    actor = await launch(*FAKE, *((f"tls={authority.directory(ACTOR)}",) if role else ()))
    tls = ("--tls", str(authority.directory(role))) if role else ()
    (tmp_path / "image.png").write_bytes(IMAGE)
    arguments = ("--address", actor.address, *tls, "--image", str(tmp_path / "image.png"), "--n", "3", "What is this?")
    theirs = await node("ask.js", *arguments)
    printed, errors = await theirs.communicate()
    assert (theirs.returncode, errors) == (0, b"")
    ours = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "actor", "ask", *arguments, "--temperature", "1"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert printed
    assert sorted(printed.split()) == sorted((await ours.communicate())[0].split())


@pytest.mark.slow
async def test_buf_lists_what_there_is(launch: Launch) -> None:
    require_node()
    actor = await launch(*FAKE)
    client = BufClient(actor.address, None)
    process = await client.run("--list-methods", client.url)
    listed, _ = await process.communicate()
    assert f"{ROLLOUTS}/Generate" in listed.decode().split()
    assert f"{WEIGHTS}/Commit" in listed.decode().split()
