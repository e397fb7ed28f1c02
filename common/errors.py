"""The one table between exceptions and gRPC statuses.

Code on both sides raises and catches the classes below. On the server `common.rpc.interceptors` sends them with
`to_status`; on the client `from_rpc_error` turns what arrives into the same class with the same attributes. A status
is a code, a message and `google.rpc` details: always `ErrorInfo` (domain "outrider", `reason` names the class), and
what the class adds.
"""
# ruff: noqa: N818 - the classes are named as the reasons that cross the wire

from typing import Any, ClassVar, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "outrider"
DETAILS_KEY = "grpc-status-details-bin"
# What a server that is full says to everybody.
_RETRY_AFTER_S = 0.5

# Statuses travel in HTTP/2 trailers, which peers bound at 8 KiB; each byte of a message may take three there.
_MAX_MESSAGE_BYTES = 1024
_MAX_DETAIL_BYTES = 512
_MAX_VIOLATIONS = 32

M = TypeVar("M", bound=Message)


class OutriderError(Exception):
    """An error with a place in the table. `code` is its gRPC status code, `reason` its `ErrorInfo.reason`."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def details(self) -> list[Message]:
        """The `google.rpc` details that carry this class's attributes."""
        return []

    @classmethod
    def restore(cls, message: str, _status: status_pb2.Status) -> "OutriderError":
        """The inverse of `details`: the error that was sent with this message and these details."""
        return cls(message)


class _FieldError(OutriderError):
    """An error about one field of a request; `field` is its path, as `media[1].encoded`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field

    def details(self) -> list[Message]:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(self.field, _MAX_DETAIL_BYTES),
            description=_cut(self.message.removeprefix(f"{self.field}: "), _MAX_DETAIL_BYTES),
        )
        return [error_details_pb2.BadRequest(field_violations=[violation])]

    @classmethod
    def restore(cls, message: str, status: status_pb2.Status) -> "OutriderError":
        violations = _find(status, error_details_pb2.BadRequest()).field_violations
        if not violations:
            return cls("", message)
        return cls(violations[0].field, message.removeprefix(f"{violations[0].field}: "))


class InvalidRequest(_FieldError):
    """A field of the request is wrong."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class TooLarge(_FieldError):
    """A size limit; the message names it."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "TOO_LARGE"


class Unimplemented(_FieldError):
    """The field is part of the contract, but this server version does nothing with it."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "UNIMPLEMENTED"


class MediaMissing(OutriderError):
    """The actor lacks the bytes of these media items: send them and ask again."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MEDIA_MISSING"

    def __init__(self, sha256s: tuple[bytes, ...]) -> None:
        super().__init__(f"{len(sha256s)} media item(s) are not stored here: send their bytes and ask again")
        self.sha256s = sha256s

    def details(self) -> list[Message]:  # noqa: D102
        failure = error_details_pb2.PreconditionFailure()
        for sha256 in self.sha256s[:_MAX_VIOLATIONS]:
            failure.violations.add(type="MEDIA", subject=sha256.hex(), description="not stored on this actor")
        return [failure]

    @classmethod
    def restore(cls, _message: str, status: status_pb2.Status) -> "OutriderError":  # noqa: D102
        violations = _find(status, error_details_pb2.PreconditionFailure()).violations
        try:
            return cls(tuple(bytes.fromhex(violation.subject) for violation in violations))
        except ValueError:
            return MalformedResponse("MEDIA_MISSING with a subject that is not a hex sha256")


class WeightsPending(OutriderError):
    """The actor does not serve (this version) yet."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "WEIGHTS_PENDING"


class StaleEpoch(OutriderError):
    """A weight call of an old run, an old epoch, or an epoch that has ended."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "STALE_EPOCH"


class NotStaged(OutriderError):
    """Commit of a version that is not staged."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "NOT_STAGED"


class Draining(OutriderError):
    """The actor is about to leave: ask another one."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "DRAINING"


class Paused(OutriderError):
    """An operator has paused this actor: ask another one."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "PAUSED"


class EngineDead(OutriderError):
    """The engine of this actor has died: ask another one."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "ENGINE_DEAD"


class QueueFull(OutriderError):
    """Too many completions run or wait; worth trying again after `retry_after_s`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"

    def __init__(
        self, message: str = "the queue of this actor is full", *, retry_after_s: float = _RETRY_AFTER_S
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def details(self) -> list[Message]:  # noqa: D102
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(round(self.retry_after_s * 1e9))
        return [info]

    @classmethod
    def restore(cls, message: str, status: status_pb2.Status) -> "OutriderError":  # noqa: D102
        delay = _find(status, error_details_pb2.RetryInfo()).retry_delay
        return cls(message, retry_after_s=delay.ToNanoseconds() / 1e9)


class TooManyStreams(QueueFull):
    """One caller has too many calls under way; others may not."""

    reason = "TOO_MANY_STREAMS"


class StageTimeout(OutriderError):
    """A weight operation missed its deadline; nothing live was touched."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "STAGE_TIMEOUT"


class StageBlocked(StageTimeout):
    """As its parent; but all that was sent to this member has come, and the next one does not take it."""

    reason = "STAGE_BLOCKED"


class RendezvousUnreachable(OutriderError):
    """A member of a weight epoch has no way to the learner's rendezvous; the others wait for it."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "RENDEZVOUS_UNREACHABLE"


class StageCorrupt(OutriderError):
    """The bytes received are not those of the manifest; nothing live was touched."""

    code = grpc.StatusCode.DATA_LOSS
    reason = "STAGE_CORRUPT"


class Internal(OutriderError):
    """A bug on the server; the message carries the id under which its log has the traceback."""


class PermissionDenied(OutriderError):
    """The caller's certificate does not allow the call."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class DeadlineExceeded(OutriderError):
    """The deadline of the call passed, or the caller was too slow for the server."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


# What a client raises without ever having been sent it by an Outrider server.


class Unreachable(OutriderError):
    """No answer of an Outrider server: it is down, cut off, or died during the call."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNREACHABLE"


class MalformedResponse(OutriderError):
    """The peer broke the contract of the proto files."""

    code = grpc.StatusCode.INTERNAL
    reason = "MALFORMED_RESPONSE"


_BY_REASON: dict[str, type[OutriderError]] = {
    cls.reason: cls
    for cls in (
        InvalidRequest,
        TooLarge,
        Unimplemented,
        MediaMissing,
        WeightsPending,
        StaleEpoch,
        NotStaged,
        Draining,
        Paused,
        EngineDead,
        QueueFull,
        TooManyStreams,
        StageTimeout,
        StageBlocked,
        RendezvousUnreachable,
        StageCorrupt,
        Internal,
        PermissionDenied,
        DeadlineExceeded,
    )
}


def to_status(error: OutriderError) -> status_pb2.Status:
    """The rich status of an error; its `code` and `message` are those of the call."""
    message = _cut(error.message, _MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=error.code.value[0], message=message)
    for detail in (error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN), *error.details()):
        status.details.add().Pack(detail)
    return status


def _cut(text: str, max_bytes: int) -> str:
    return text.encode(errors="replace")[:max_bytes].decode(errors="ignore")


def from_rpc_error(error: grpc.aio.AioRpcError) -> OutriderError:
    """The error that the server raised, or what the transport's own failure means."""
    message = error.details() or error.code().name
    status = _rich_status(error)
    info = _find(status, error_details_pb2.ErrorInfo())
    if info.domain == DOMAIN:
        return _BY_REASON.get(info.reason, OutriderError).restore(message, status)
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return TooLarge("", message)
        case grpc.StatusCode.UNIMPLEMENTED:
            return Unimplemented("", message)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest("", message)
        case code:
            # A server that dies in mid-stream shows as UNAVAILABLE, CANCELLED, UNKNOWN or INTERNAL (RST_STREAM).
            cause = message.rpartition("last error: ")[2].rpartition("Failed to connect to remote host: ")[2]
            return Unreachable(f"{code.name}: {message}" if cause == message else cause)


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    metadata: Any = error.trailing_metadata() or {}
    try:
        return status_pb2.Status.FromString(metadata.get(DETAILS_KEY) or b"")
    except DecodeError:  # not one of ours
        return status_pb2.Status()


def _find(status: status_pb2.Status, empty: M) -> M:
    """The first detail of `empty`'s type, or `empty` itself; also where the detail is damaged."""
    for detail in status.details:
        if detail.Is(empty.DESCRIPTOR):
            try:
                return type(empty).FromString(detail.value)
            except DecodeError:
                return empty
    return empty
