"""Native gRPC probes, as the kubelet makes them: plaintext, the manifest's numbers, a verdict after so many answers."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.manifests.rendered import Manifest


@dataclass(frozen=True)
class Probe:
    """The numbers of one probe; the defaults are those of Kubernetes."""

    port: int
    service: str
    period_s: float
    timeout_s: float
    failure_threshold: int
    success_threshold: int

    @classmethod
    def of(cls, probe: Manifest) -> "Probe":
        """As the manifest says it."""
        return cls(
            port=probe["grpc"]["port"],
            service=probe["grpc"].get("service", ""),
            period_s=probe.get("periodSeconds", 10),
            timeout_s=probe.get("timeoutSeconds", 1),
            failure_threshold=probe.get("failureThreshold", 3),
            success_threshold=probe.get("successThreshold", 1),
        )


async def ask(address: str, probe: Probe) -> bool:
    """One question over a connection of its own."""
    async with grpc.aio.insecure_channel(f"{address}:{probe.port}", [("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            request = health_pb2.HealthCheckRequest(service=probe.service)
            response = await stub.Check(request, timeout=probe.timeout_s)
        except grpc.aio.AioRpcError:
            return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def watch(address: str, probe: Probe, decided: Callable[[bool], None]) -> None:
    """Ask for ever, and tell `decided` after so many equal answers in a row; again with each further one."""
    in_a_row, last = 0, None
    while True:
        started_at = time.monotonic()
        healthy = await ask(address, probe)
        in_a_row = in_a_row + 1 if healthy is last else 1
        last = healthy
        if in_a_row >= (probe.success_threshold if healthy else probe.failure_threshold):
            decided(healthy)
        await asyncio.sleep(max(0.0, started_at + probe.period_s - time.monotonic()))
