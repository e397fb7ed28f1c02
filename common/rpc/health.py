"""`grpc.health.v1`. The servicer of grpcio-health-checking writes to those who watch under the lock that a new state
needs: one caller that takes no answer would keep a server from ever saying, or noticing, that it is no longer well.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.rpc.peers import Context

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it has no types
    """Belongs to one event loop. Nobody waits for those who watch."""

    def __init__(self) -> None:
        self._healthy: dict[str, bool] = {}
        self._changed = asyncio.Event()  # each state has one, set when the next one comes

    def set(self, healthy: Mapping[str, bool]) -> None:
        """The state of all services from now on."""
        self._healthy = dict(healthy)
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """The state of one service; NOT_FOUND if there is none of this name."""
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return _Status(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state of one service, now and whenever it is another; a slow caller misses those in between."""
        last = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != last:
                yield _Status(status=status)
            last = status
            await changed.wait()

    def _status(self, service: str) -> int:
        if service not in self._healthy:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if self._healthy[service] else _Status.NOT_SERVING)
