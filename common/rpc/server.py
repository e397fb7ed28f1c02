"""A gRPC server as all of ours are: health, reflection, keepalive, bounds, and no surprise about its port."""

import errno
import ipaddress
import socket
from collections.abc import Iterable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.config import ConfigError
from common.log import get_logger
from common.rpc import tls as tls_files
from common.rpc.health import Health
from common.rpc.interceptors import Activity, CallInterceptor
from common.rpc.options import DEFAULT_MAX_MESSAGE_BYTES, server_options
from common.rpc.peers import StreamLimit

log = get_logger(__name__)

MAX_STREAMS_PER_PEER = 1024
# Calls that one connection may have open: gRPC refuses further ones, polls of the state too, as if nobody were there.
# So they are some times the streams that are answered, and who has too many of those hears of it.
_CALLS_PER_STREAM, _SINGLE_CALLS = 4, 64
# Of the port for probes, which anybody may reach. Their messages hold the name of a service.
_MAX_PROBE_BYTES = 4096
_MAX_PROBE_STREAMS = 16


class RpcServer:
    """`grpc.aio.Server` with health, reflection, error mapping and an activity counter.

    Example::

        server = RpcServer()
        add_RolloutServiceServicer_to_server(servicer, server.grpc)
        port = await server.start("127.0.0.1:50051", ["rollout.v1.RolloutService"])
        server.set_health(liveness=True, readiness=False)
    """

    def __init__(
        self,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        *,
        tls: Path | None = None,
        max_streams_per_peer: int = MAX_STREAMS_PER_PEER,
    ) -> None:
        """`tls`: the directory of certificates, see `common.rpc.tls`; None: plaintext. Raises ConfigError."""
        self.activity = Activity()
        self._credentials = tls_files.server_credentials(tls) if tls is not None else None
        self.grpc = grpc.aio.server(
            interceptors=[
                CallInterceptor(self.activity, StreamLimit(max_streams_per_peer), checks_roles=tls is not None)
            ],
            options=server_options(max_message_bytes, _CALLS_PER_STREAM * max_streams_per_peer + _SINGLE_CALLS),
        )
        self._health = Health()
        self._probes: grpc.aio.Server | None = None

    async def start(self, listen: str, services: Iterable[str]) -> int:
        """Serve at `host:port` and announce `services` through reflection; the port (of use where it was 0).

        Raises ConfigError if the port is taken.
        """
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        names = (*services, health_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc)
        self.set_health(liveness=True, readiness=False)
        port = _open("listen", self.grpc, listen, self._credentials)
        await self.grpc.start()
        return port

    async def start_probes(self, listen: str) -> int:
        """Serve health alone, in plaintext, for probes that have no certificate; the port. Raises ConfigError."""
        self._probes = grpc.aio.server(options=server_options(_MAX_PROBE_BYTES, _MAX_PROBE_STREAMS))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probes)
        port = _open("health_listen", self._probes, listen, None)
        await self._probes.start()
        return port

    def set_health(self, *, liveness: bool, readiness: bool) -> None:
        """Health of the services "liveness" and "readiness"; the whole server ("") is as healthy as "readiness"."""
        self._health.set({"liveness": liveness, "readiness": readiness, "": readiness})

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls at once; cancel those that still run after `grace_s`."""
        await self.grpc.stop(grace_s)
        if self._probes is not None:
            await self._probes.stop(0.0)


def _open(key: str, server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is None:
            return server.add_insecure_port(listen)
        return server.add_secure_port(listen, credentials)
    except RuntimeError:
        raise ConfigError(_taken(key, listen)) from None


def reserve_port(listen: str, *, insecure: bool, tls: bool = False) -> socket.socket:
    """Take `host:port` before something slow starts; close the socket just before the server binds the port.

    The socket does not listen, so clients are refused meanwhile. Raises ConfigError for an address that is malformed,
    taken, or not loopback without `insecure` or `tls`.
    """
    host, _ = split_address(listen)
    if not is_loopback(host) and not tls:
        if not insecure:
            raise ConfigError(
                f"listen: {listen} is not a loopback address and the connection is plaintext;"
                " listen on 127.0.0.1, give certificates with tls=DIR, or set insecure=true if the network is trusted"
            )
        log.warning("plaintext on a network address", listen=listen)
    return _bound("listen", listen)


def check_port(key: str, listen: str) -> None:
    """Raises ConfigError if `host:port` cannot be had now; it says which `key` of the configuration asks for it."""
    _bound(key, listen).close()


def _bound(key: str, listen: str) -> socket.socket:
    host, port = split_address(listen)
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Connections of a server that has just stopped do not keep the port. Once it is bound the option goes: two
        # sockets that both have it may both be bound, as long as neither listens.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(_taken(key, listen)) from None
        raise ConfigError(f"{key}: {listen}: {error.strerror or error}") from None
    return bound


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` as host and port. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{address!r} is not an address; write host:port, as 127.0.0.1:50051")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _taken(key: str, listen: str) -> str:
    return f"{key}: {listen} is in use by another process; stop it or choose another port"
