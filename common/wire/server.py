"""What an actor says about itself: `ServerInfo` (rollout.v1) and `ActorStatus` (weights.v1)."""

import dataclasses

from common.errors import MalformedResponse
from common.pb.rollout.v1 import rollout_pb2
from common.pb.weights.v1 import weights_pb2
from common.types import ActorState, ActorStatus, ServerInfo, ServerLimits

_STATE = {state: weights_pb2.ActorState.Value(f"ACTOR_STATE_{state.name}") for state in ActorState}
_STATE_BACK = {number: state for state, number in _STATE.items()}
_INFO_FIELDS = ("actor_id", "model", "architecture", "engine", "engine_version", "server_version", "policy_version")
_STATUS_FIELDS = (
    "actor_id",
    "policy_version",
    "run_id",
    "epoch",
    "staged_version",
    "num_running",
    "num_waiting",
    "num_workers",
    "max_lora_rank",
)


def server_info_to_proto(info: ServerInfo) -> rollout_pb2.GetServerInfoResponse:
    """`ServerInfo` as a message."""
    return rollout_pb2.GetServerInfoResponse(
        **{name: getattr(info, name) for name in _INFO_FIELDS},
        limits=rollout_pb2.Limits(**dataclasses.asdict(info.limits)),
        suppressed_token_ids=info.suppressed_token_ids,
        adapters=info.adapters,
    )


def server_info_from_proto(message: rollout_pb2.GetServerInfoResponse) -> ServerInfo:
    """The inverse."""
    names = [field.name for field in dataclasses.fields(ServerLimits)]
    return ServerInfo(
        **{name: getattr(message, name) for name in _INFO_FIELDS},
        limits=ServerLimits(**{name: getattr(message.limits, name) for name in names}),
        suppressed_token_ids=tuple(message.suppressed_token_ids),
        adapters=tuple(message.adapters),
    )


def status_to_proto(status: ActorStatus) -> weights_pb2.GetStatusResponse:
    """`ActorStatus` as a message."""
    return weights_pb2.GetStatusResponse(
        state=_STATE[status.state], **{name: getattr(status, name) for name in _STATUS_FIELDS}
    )


def status_from_proto(message: weights_pb2.GetStatusResponse) -> ActorStatus:
    """The inverse. Raises MalformedResponse for a state that this version does not know."""
    if message.state not in _STATE_BACK:
        raise MalformedResponse(f"state: {message.state} is not known")
    return ActorStatus(state=_STATE_BACK[message.state], **{name: getattr(message, name) for name in _STATUS_FIELDS})
