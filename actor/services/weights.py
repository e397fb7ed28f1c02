"""`weights.v1.WeightService`: the wire in front of `actor.weights.policy_state.PolicyState`."""

from typing import Any

import grpc

from actor.engine import Engine, EngineInfo
from actor.weights.policy_state import PolicyState
from common.errors import InvalidRequest
from common.pb.weights.v1 import weights_pb2 as pb
from common.pb.weights.v1 import weights_pb2_grpc
from common.process.threads import to_own_thread
from common.types import ActorStatus
from common.wire import epoch_from_proto, manifest_from_proto, status_to_proto

Context = Any  # grpc.aio.ServicerContext; nothing of it is used


class WeightService(weights_pb2_grpc.WeightServiceServicer):
    """See proto/weights/v1/weights.proto."""

    def __init__(self, engine: Engine, policy: PolicyState, actor_id: str, info: EngineInfo) -> None:
        self._engine = engine
        self._policy = policy
        self._actor_id = actor_id
        self._num_workers = info.num_workers
        self._max_lora_rank = info.max_lora_rank

    def add_to(self, server: grpc.aio.Server) -> str:
        """Register with `server`; the name of the service."""
        weights_pb2_grpc.add_WeightServiceServicer_to_server(self, server)
        return pb.DESCRIPTOR.services_by_name["WeightService"].full_name

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        """What is served, and how busy it is."""
        load, policy = self._engine.load(), self._policy
        status = ActorStatus(
            actor_id=self._actor_id,
            state=policy.state,
            policy_version=policy.policy_version,
            run_id=policy.run_id,
            epoch=policy.epoch,
            staged_version=policy.staged_version,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_workers=self._num_workers,
            max_lora_rank=self._max_lora_rank,
        )
        return status_to_proto(status)

    async def OpenEpoch(self, request: pb.OpenEpochRequest, context: Context) -> pb.OpenEpochResponse:
        """Join a broadcast group."""
        spec = epoch_from_proto(request)
        if spec.rank + self._num_workers > spec.world_size:
            raise InvalidRequest(
                "world_size", f"is {spec.world_size}; rank {spec.rank} and {self._num_workers} worker(s) do not fit"
            )
        await self._policy.open_epoch(spec)
        return pb.OpenEpochResponse()

    async def Stage(self, request: pb.StageRequest, context: Context) -> pb.StageResponse:
        """Receive one version."""
        # Thousands of parameters: checked off the event loop, which goes on streaming completions, and off its threads,
        # which may all be decoding images.
        manifest = await to_own_thread("manifest", manifest_from_proto, request.manifest)
        timeout_s = _timeout_s(request.timeout_ms)
        checksums, receive_s = await self._policy.stage(request.run_id, request.epoch, manifest, timeout_s)
        return pb.StageResponse(xxh3=checksums, receive_s=receive_s)

    async def Commit(self, request: pb.CommitRequest, context: Context) -> pb.CommitResponse:
        """Make the staged version live."""
        pause_s = await self._policy.commit(
            request.run_id, request.epoch, request.policy_version, _timeout_s(request.timeout_ms)
        )
        return pb.CommitResponse(policy_version=request.policy_version, pause_s=pause_s)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """Drop what is staged and leave the epoch."""
        await self._policy.abort(request.run_id, request.epoch)
        return pb.AbortResponse()


def _timeout_s(timeout_ms: int) -> float:
    if not timeout_ms:
        raise InvalidRequest("timeout_ms", "must be positive")
    return timeout_ms / 1e3
