"""`admin.v1.AdminService`: the wire in front of `actor.pause.Pause`."""

from typing import Any

import grpc

from actor.engine import Engine
from actor.weights.policy_state import PolicyState
from common.errors import InvalidRequest
from common.pb.admin.v1 import admin_pb2 as pb
from common.pb.admin.v1 import admin_pb2_grpc

Context = Any  # grpc.aio.ServicerContext; nothing of it is used

_DEFAULT_TIMEOUT_MS = 600_000
_MAX_TIMEOUT_MS = 3_600_000


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """See proto/admin/v1/admin.proto."""

    def __init__(self, engine: Engine, policy: PolicyState) -> None:
        self._engine = engine
        self._policy = policy

    def add_to(self, server: grpc.aio.Server) -> str:
        """Register with `server`; the name of the service."""
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self, server)
        return pb.DESCRIPTOR.services_by_name["AdminService"].full_name

    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.PauseResponse:
        """Let generation stand still."""
        if request.timeout_ms > _MAX_TIMEOUT_MS:
            raise InvalidRequest("timeout_ms", f"is {request.timeout_ms}; at most {_MAX_TIMEOUT_MS}")
        await self._policy.pause((request.timeout_ms or _DEFAULT_TIMEOUT_MS) / 1e3)
        load = self._engine.load()
        return pb.PauseResponse(num_running=load.num_running, num_waiting=load.num_waiting)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeResponse:
        """Let it go on."""
        await self._policy.resume()
        return pb.ResumeResponse()
