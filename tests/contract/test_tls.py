"""Mutual TLS on real sockets: who is refused, what each role may call, and certificates that change under way."""

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography import x509
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc

from actor.config import ActorConfig
from actor.engine_fake.engine import FakeEngine
from actor.server import ActorServer
from common.client import GrpcClient
from common.config import ConfigError
from common.errors import OutriderError, PermissionDenied, Unreachable
from common.pb.weights.v1 import weights_pb2, weights_pb2_grpc
from common.rpc.server import reserve_port
from common.rpc.tls import ACTOR, LEARNER, READER, Certificates, channel_credentials, read_certificates
from common.types import ActorState, ChatMessage, ChatPrompt, RolloutRequest, SamplingParams, TextPart
from tests.helpers.authority import OURS, PUBLIC, Authority
from tests.helpers.fake_actors import png

REQUEST = RolloutRequest("g", ChatPrompt((ChatMessage("user", (TextPart("hello"),)),)), (), SamplingParams(n=2))
READ = {
    "rollout.v1.RolloutService.Generate",
    "rollout.v1.RolloutService.GetServerInfo",
    "rollout.v1.RolloutService.PutMedia",
    "weights.v1.WeightService.GetStatus",
}
BEHIND_THE_DOOR = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "good")


@contextlib.asynccontextmanager
async def serving(directory: Path, **values: Any) -> AsyncIterator[tuple[str, ActorServer]]:
    """The address of an actor with the certificates of a directory."""
    config = ActorConfig.model_validate({"engine": "fake", "standalone": True, "tls": directory, **values})
    engine = FakeEngine(config.fake, "actor-1")
    server = ActorServer(engine, await engine.start(), config, "actor-1")
    try:
        yield f"127.0.0.1:{await server.start('127.0.0.1:0')}", server
    finally:
        await server.stop(grace_s=0)
        await engine.stop()


@contextlib.asynccontextmanager
async def client_of(address: str, tls: Path | None) -> AsyncIterator[GrpcClient]:
    client = GrpcClient(address, tls=tls)
    try:
        yield client
    finally:
        await client.close()


async def test_a_learner_may_do_everything(authority: Authority) -> None:
    async with (
        serving(authority.directory(ACTOR)) as (address, _),
        client_of(address, authority.directory(LEARNER)) as client,
    ):
        assert (await client.status()).state is ActorState.SERVING
        assert len((await client.generate(REQUEST, timeout_s=10)).completions) == 2
        await client.abort("run", 1)


async def calls(address: str, credentials: grpc.ChannelCredentials) -> dict[str, grpc.StatusCode]:
    """What each method says to an empty request; OK and INVALID_ARGUMENT both come from behind the door."""
    options = [("grpc.ssl_target_name_override", ACTOR)]
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        return {name: await code_of(channel, method) for name, method in (OURS | PUBLIC).items()}


async def code_of(channel: grpc.aio.Channel, method: MethodDescriptor) -> grpc.StatusCode:
    """OK for a stream means its first answer."""
    kind = "_".join("stream" if streams else "unary" for streams in (method.client_streaming, method.server_streaming))
    start: Any = getattr(channel, kind)(f"/{method.containing_service.full_name}/{method.name}")
    call = start(iter([b""]) if method.client_streaming else b"", timeout=10)
    try:
        await (call.read() if method.server_streaming else call)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("name", "allowed"),
    [(LEARNER, {*OURS}), (READER, READ), (ACTOR, set()), ("somebody.else", set())],
)
async def test_each_call_is_refused_to_the_wrong_role(authority: Authority, name: str, allowed: set[str]) -> None:
    async with serving(authority.directory(ACTOR)) as (address, _):
        codes = await calls(address, channel_credentials(read_certificates(authority.directory(name, place="caller"))))
    refused = {method for method, code in codes.items() if code is grpc.StatusCode.PERMISSION_DENIED}
    assert refused == OURS.keys() - allowed
    assert {codes[method] for method in PUBLIC} == {grpc.StatusCode.OK}
    assert set(codes.values()) <= {*BEHIND_THE_DOOR, grpc.StatusCode.PERMISSION_DENIED}


def no_certificate(authority: Authority, _tmp_path: Path) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(read_certificates(authority.directory(LEARNER)).ca)


def wrong_authority(authority: Authority, tmp_path: Path) -> grpc.ChannelCredentials:
    other = read_certificates(Authority(tmp_path / "other").directory(LEARNER))
    files = read_certificates(authority.directory(LEARNER))
    return channel_credentials(Certificates(other.certificate, other.key, files.ca, ()))


def expired(authority: Authority, _tmp_path: Path) -> grpc.ChannelCredentials:
    past = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    directory = authority.directory(LEARNER, not_before=past, not_after=past + dt.timedelta(days=1))
    return channel_credentials(read_certificates(directory))


@pytest.mark.parametrize("credentials", [no_certificate, wrong_authority, expired])
async def test_each_call_is_refused_without_a_good_certificate(
    authority: Authority, tmp_path: Path, credentials: Callable[[Authority, Path], grpc.ChannelCredentials]
) -> None:
    async with serving(authority.directory(ACTOR)) as (address, _):
        codes = await calls(address, credentials(authority, tmp_path))
    assert len(codes) == len(OURS) + len(PUBLIC) > 10
    assert set(codes.values()) == {grpc.StatusCode.UNAVAILABLE}


async def test_a_server_with_another_name_is_not_believed(authority: Authority) -> None:
    async with (
        serving(authority.directory(LEARNER)) as (address, _),
        client_of(address, authority.directory(READER)) as client,
    ):
        with pytest.raises(Unreachable):
            await client.status()


async def test_plaintext_is_refused_by_a_server_with_certificates(authority: Authority) -> None:
    async with serving(authority.directory(ACTOR)) as (address, _), client_of(address, None) as client:
        with pytest.raises(OutriderError):
            await client.status()


@pytest.mark.parametrize("kind", [x509.UniformResourceIdentifier, x509.RFC822Name])
async def test_only_a_dns_name_is_a_role(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, kind: Callable[[str], x509.GeneralName]
) -> None:
    async with serving(authority.directory(ACTOR)) as (address, _):
        monkeypatch.setattr(trustme, "_identity_string_to_x509", kind)
        codes = await calls(address, channel_credentials(read_certificates(authority.directory(LEARNER))))
    assert {codes[method] for method in OURS} == {grpc.StatusCode.PERMISSION_DENIED}


async def test_the_message_says_what_is_needed(authority: Authority) -> None:
    async with (
        serving(authority.directory(ACTOR)) as (address, _),
        client_of(address, authority.directory(READER)) as client,
    ):
        with pytest.raises(
            PermissionDenied,
            match=r"Abort needs a certificate with the name learner\.outrider; the caller's names are reader",
        ):
            await client.abort("run", 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.status(),
        lambda client: client.generate(REQUEST, timeout_s=10),
        lambda client: client.put_media([png()]),
    ],
    ids=["status", "generate", "put_media"],
)
async def test_certificates_change_under_a_running_server_and_its_client(
    authority: Authority, tmp_path: Path, call: Callable[[GrpcClient], Awaitable[object]]
) -> None:
    server_dir, client_dir = authority.directory(ACTOR), authority.directory(LEARNER)
    async with serving(server_dir, fake={"token_s": 0.05}) as (address, _), client_of(address, client_dir) as client:
        await client.status()
        under_way = asyncio.create_task(client.generate(REQUEST, timeout_s=30))
        await asyncio.sleep(0)
        old, before = channel_credentials(read_certificates(client_dir)), client._channel
        other = Authority(tmp_path / "good")  # another CA: everything is new
        other.directory(ACTOR)
        other.directory(LEARNER)
        await call(client)
        assert client._channel is not before
        assert len((await under_way).completions) == 2
        assert set((await calls(address, old)).values()) == {grpc.StatusCode.UNAVAILABLE}


async def test_half_a_rotation_changes_nothing(authority: Authority) -> None:
    server_dir = authority.directory(ACTOR)
    async with serving(server_dir) as (address, _):
        (server_dir / "tls.key").write_text("nonsense")
        async with client_of(address, authority.directory(LEARNER)) as client:
            await client.status()


async def test_probes_need_no_certificate_and_see_nothing_else(authority: Authority) -> None:
    with reserve_port("127.0.0.1:0", insecure=False) as reserved:
        probes = f"127.0.0.1:{reserved.getsockname()[1]}"
    async with serving(authority.directory(ACTOR), health_listen=probes), grpc.aio.insecure_channel(probes) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        status: Any = weights_pb2_grpc.WeightServiceStub(channel).GetStatus
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await status(weights_pb2.GetStatusRequest(), timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_probe_is_small(authority: Authority) -> None:
    with reserve_port("127.0.0.1:0", insecure=False) as reserved:
        probes = f"127.0.0.1:{reserved.getsockname()[1]}"
    async with serving(authority.directory(ACTOR), health_listen=probes), grpc.aio.insecure_channel(probes) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Check(health_pb2.HealthCheckRequest(service="x" * 2**16), timeout=10)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=10) for _ in range(16)]
        assert [(await watch.read()).status for watch in watches] == [health_pb2.HealthCheckResponse.SERVING] * 16
        with pytest.raises(grpc.aio.AioRpcError) as refused:  # it waits for one of them to end
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=0.5)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.fixture
def incomplete(authority: Authority) -> Path:
    directory = authority.directory(ACTOR)
    (directory / "ca.crt").unlink()
    return directory


def test_files_that_are_missing_or_do_not_fit_are_named(authority: Authority, incomplete: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no ca.crt; it needs tls.crt, tls.key, ca.crt"):
        read_certificates(incomplete)
    mixed = authority.directory(ACTOR)
    (mixed / "tls.key").write_bytes((Authority(tmp_path / "other").directory(ACTOR) / "tls.key").read_bytes())
    with pytest.raises(ConfigError, match=r"cannot be used: .*KEY_VALUES_MISMATCH"):
        read_certificates(mixed)


def test_other_addresses_are_allowed_with_certificates() -> None:
    with pytest.raises(ConfigError, match="give certificates with tls=DIR"):
        reserve_port("0.0.0.0:0", insecure=False)
    reserve_port("0.0.0.0:0", insecure=False, tls=True).close()
