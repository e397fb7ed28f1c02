"""Prometheus over HTTP, for actors and the learner alike."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, start_http_server

from common.config import ConfigError
from common.rpc.server import split_address


def serve_metrics(registry: CollectorRegistry, listen: str) -> tuple[int, Callable[[], None]]:
    """Answer HTTP at `host:port`; the port, and what stops it. Raises ConfigError if it is taken."""
    host, port = split_address(listen)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"metrics_listen: {listen}: {error.strerror or error}") from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop
