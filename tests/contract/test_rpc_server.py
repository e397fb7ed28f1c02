"""What every server of ours has: health, reflection, one owner per port, plaintext on loopback only."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common import errors
from common.config import ConfigError
from common.errors import from_rpc_error
from common.pb.rollout.v1 import rollout_pb2
from common.pb.weights.v1 import weights_pb2
from common.pb.weights.v1.weights_pb2_grpc import (
    WeightServiceServicer,
    WeightServiceStub,
    add_WeightServiceServicer_to_server,
)
from common.rpc.channel import open_channel
from common.rpc.server import RpcServer, check_port, is_loopback, join_address, reserve_port, split_address
from common.types import ActorState
from tests.helpers.fake_actors import FakeActor, StartActor
from tests.helpers.fakes import until

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def _health(actor: FakeActor) -> dict[str, int]:
    stub = health_pb2_grpc.HealthStub(actor.channel)
    names = ("", "liveness", "readiness")
    return {name: (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in names}


async def _becomes(actor: FakeActor, expected: dict[str, int]) -> None:
    """Wait for this health; the test's own time limit bounds it."""
    while await _health(actor) != expected:  # noqa: ASYNC110 - asked over the wire
        await asyncio.sleep(0.01)


async def test_health_follows_the_state(start_actor: StartActor) -> None:
    actor = await start_actor(standalone=False)
    assert await _health(actor) == {"": NOT_SERVING, "liveness": SERVING, "readiness": NOT_SERVING}
    actor.server.policy._become(ActorState.SERVING)
    await _becomes(actor, {"": SERVING, "liveness": SERVING, "readiness": SERVING})
    actor.server.policy.drain()
    await _becomes(actor, {"": NOT_SERVING, "liveness": SERVING, "readiness": NOT_SERVING})
    actor.server.policy.fail()
    await _becomes(actor, {"": NOT_SERVING, "liveness": NOT_SERVING, "readiness": NOT_SERVING})


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


@contextlib.asynccontextmanager
async def _watch_that_takes_nothing(address: str, service: bytes) -> AsyncIterator[None]:
    """Raw HTTP/2, after RFC 9113: a caller that answers pings, and leaves no room for an answer to its Watch.

    The body runs once the server has such an answer: its headers have come, for which no room is needed.
    """
    no_room = _frame(4, 0, 0, (4).to_bytes(2, "big") + bytes(4))  # SETTINGS_INITIAL_WINDOW_SIZE = 0
    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/grpc.health.v1.Health/Watch",
        b":authority": b"x",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    # Literals without indexing, of names and values shorter than 127 bytes.
    headers = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in fields.items())
    request = b"\x0a%c%b" % (len(service), service)
    message = b"\0" + len(request).to_bytes(4, "big") + request
    answered = asyncio.Event()
    reader, writer = await asyncio.open_connection(*address.split(":"))

    async def read() -> None:
        while True:
            head = await reader.readexactly(9)
            kind, flags = head[3:5]
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            if kind == 1:
                answered.set()
            elif kind in {4, 6} and not flags & 1:  # SETTINGS and PING want to be acknowledged
                writer.write(_frame(kind, 1, 0, payload if kind == 6 else b""))

    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + no_room + _frame(1, 4, 1, headers) + _frame(0, 1, 1, message))
    reading = asyncio.create_task(read())
    try:
        await answered.wait()
        yield
    finally:
        reading.cancel()
        writer.close()


async def test_a_watch_that_takes_nothing_holds_up_nobody(start_actor: StartActor) -> None:
    actor = await start_actor(fake={"die_at_group": 1})
    async with _watch_that_takes_nothing(actor.address, b"liveness"):
        with pytest.raises(grpc.aio.AioRpcError):
            await actor.rollouts.Generate(rollout_pb2.GenerateRequest(group_id="g", text="x")).read()
        async with asyncio.timeout(5):
            await actor.server.failed.wait()
        assert await _health(actor) == {"": NOT_SERVING, "liveness": NOT_SERVING, "readiness": NOT_SERVING}
        async with asyncio.timeout(5):
            await actor.server.stop(grace_s=60)


async def test_a_watch_sees_each_change() -> None:
    server = RpcServer()
    port = await server.start("127.0.0.1:0", [])
    channel = open_channel(f"127.0.0.1:{port}", default_timeout_s=10)
    stub = health_pb2_grpc.HealthStub(channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("readiness", "liveness", "other")]
    unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    assert [(await watch.read()).status for watch in watches] == [NOT_SERVING, SERVING, unknown]
    server.set_health(liveness=True, readiness=True)
    assert (await watches[0].read()).status == SERVING
    server.set_health(liveness=False, readiness=True)
    assert (await watches[1].read()).status == NOT_SERVING  # and not once more that it is healthy
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Check(health_pb2.HealthCheckRequest(service="other"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    await channel.close()
    await server.stop(0)


async def test_reflection_lists_the_services_and_gives_the_files(start_actor: StartActor) -> None:
    actor = await start_actor()
    stub = reflection_pb2_grpc.ServerReflectionStub(actor.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="rollout.v1.RolloutService"),
    ]
    listed, found = [response async for response in stub.ServerReflectionInfo(iter(requests))]
    assert sorted(service.name for service in listed.list_services_response.service) == [
        "admin.v1.AdminService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "rollout.v1.RolloutService",
        "weights.v1.WeightService",
    ]
    file = descriptor_pb2.FileDescriptorProto.FromString(found.file_descriptor_response.file_descriptor_proto[0])
    assert [method.name for method in file.service[0].method] == ["Generate", "PutMedia", "GetServerInfo"]


async def test_the_port_has_one_owner(start_actor: StartActor) -> None:
    actor = await start_actor()
    with pytest.raises(ConfigError, match=f"listen: {actor.address} is in use by another process"):
        reserve_port(actor.address, insecure=False)
    second = RpcServer()
    with pytest.raises(ConfigError, match=f"listen: {actor.address} is in use by another process"):
        await second.start(actor.address, [])
    await second.stop(0)


async def test_a_reserved_port_refuses_clients_and_goes_to_the_server() -> None:
    reserved = reserve_port("127.0.0.1:0", insecure=False)
    port = reserved.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    reserved.close()
    server = RpcServer()
    assert await server.start(f"127.0.0.1:{port}", []) == port
    await server.stop(0)


def _port_in_time_wait() -> int:
    """Of a server that closed its connection first, and then stopped."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()
            assert client.recv(1) == b""
    with socket.socket() as plain, pytest.raises(OSError, match="Address already in use"):
        plain.bind(("127.0.0.1", port))
    return port


async def test_a_port_with_connections_in_time_wait_is_free() -> None:
    port = _port_in_time_wait()
    reserve_port(f"127.0.0.1:{port}", insecure=False).close()
    check_port("health_listen", f"127.0.0.1:{port}")
    server = RpcServer()
    assert await server.start(f"127.0.0.1:{port}", []) == port
    await server.stop(0)


@pytest.mark.parametrize("was_used", [False, True])
def test_a_reserved_port_has_one_holder(was_used: bool) -> None:
    """Neither of two that load listens, and both allow for connections in TIME_WAIT."""
    with reserve_port(f"127.0.0.1:{_port_in_time_wait() if was_used else 0}", insecure=False) as reserved:
        address = join_address(*reserved.getsockname())
        with pytest.raises(ConfigError, match=f"^listen: {address} is in use by another process"):
            reserve_port(address, insecure=False)
        with pytest.raises(ConfigError, match=f"^metrics_listen: {address} is in use by another process"):
            check_port("metrics_listen", address)
    reserve_port(address, insecure=False).close()


def test_plaintext_is_for_loopback() -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0:0 is not a loopback address"):
        reserve_port("0.0.0.0:0", insecure=False)
    reserve_port("0.0.0.0:0", insecure=True).close()
    reserve_port("[::1]:0", insecure=False).close()
    reserve_port("localhost:0", insecure=False).close()


def test_addresses() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "10.0.0.1", "host")] == [
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    for address, parts in (("127.0.0.1:5", ("127.0.0.1", 5)), ("[::1]:5", ("::1", 5)), ("host:0", ("host", 0))):
        assert split_address(address) == parts
        assert join_address(*parts) == address
    for wrong in ("host", "host:", ":5", "host:x", "host:65536", "host:-1"):
        with pytest.raises(ConfigError, match="is not an address"):
            split_address(wrong)


async def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(ConfigError, match=r"listen: 192\.0\.2\.1:0: Cannot assign requested address"):
        reserve_port("192.0.2.1:0", insecure=True)


async def test_every_call_has_a_deadline() -> None:
    class Stuck(WeightServiceServicer):
        async def GetStatus(self, request: object, context: object) -> weights_pb2.GetStatusResponse:  # noqa: N802
            await asyncio.sleep(60)
            return weights_pb2.GetStatusResponse()

    server = RpcServer()
    add_WeightServiceServicer_to_server(Stuck(), server.grpc)
    port = await server.start("127.0.0.1:0", [])
    channel = open_channel(f"127.0.0.1:{port}", default_timeout_s=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await WeightServiceStub(channel).GetStatus(weights_pb2.GetStatusRequest())
    assert isinstance(from_rpc_error(raised.value), errors.DeadlineExceeded)
    await channel.close()
    await server.stop(0)


async def test_nobody_there(unused_tcp_port: int) -> None:
    channel = open_channel(f"127.0.0.1:{unused_tcp_port}", default_timeout_s=5)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await WeightServiceStub(channel).GetStatus(weights_pb2.GetStatusRequest())
    assert isinstance(from_rpc_error(raised.value), errors.Unreachable)
    await channel.close()


async def test_activity_counts_calls_but_not_probes(start_actor: StartActor) -> None:
    actor = await start_actor(fake={"token_s": 1.0})
    activity = actor.server.rpc.activity
    request = rollout_pb2.GenerateRequest(
        group_id="g", text="x", sampling=rollout_pb2.SamplingParams(max_tokens=60, ignore_eos=True)
    )
    call = actor.rollouts.Generate(request)
    await call.read()
    assert (activity.num_active, activity.idle_s) == (1, 0.0)
    call.cancel()
    await until(lambda: activity.idle_s > 0.5, pause_s=0.01)
    assert activity.num_active == 0
    before_s = activity.idle_s
    await _health(actor)
    assert activity.idle_s >= before_s
    await actor.weights.GetStatus(weights_pb2.GetStatusRequest())
    assert activity.idle_s < before_s
