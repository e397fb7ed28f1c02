import base64
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2

from common import errors
from common.errors import OutriderError, from_rpc_error, to_status

EVERY_ERROR = [
    errors.InvalidRequest("media[1].encoded", "is empty"),
    errors.TooLarge("chunk", "2 bytes; the limit is 1"),
    errors.Unimplemented("sampling.top_logprobs", "not yet"),
    errors.MediaMissing((bytes(range(32)), b"\xff" * 32)),
    errors.WeightsPending("pending"),
    errors.StaleEpoch("epoch 3 is not the current one (4)"),
    errors.NotStaged("nothing is staged"),
    errors.Draining("draining"),
    errors.Paused("paused"),
    errors.EngineDead("dead"),
    errors.QueueFull("full", retry_after_s=0.25),
    errors.TooManyStreams("256 calls of one caller"),
    errors.StageTimeout("late"),
    errors.StageBlocked("late"),
    errors.StageCorrupt("bucket 1"),
    errors.RendezvousUnreachable("no connection to 10.0.0.1:4321"),
    errors.Internal("internal error 0abc"),
    errors.PermissionDenied("Abort needs another certificate"),
    errors.DeadlineExceeded("no chunk has come for 60 s"),
]
# As the proto files promise them.
EXPECTED = {
    "InvalidRequest": (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    "TooLarge": (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE"),
    "Unimplemented": (grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED"),
    "MediaMissing": (grpc.StatusCode.FAILED_PRECONDITION, "MEDIA_MISSING"),
    "WeightsPending": (grpc.StatusCode.FAILED_PRECONDITION, "WEIGHTS_PENDING"),
    "StaleEpoch": (grpc.StatusCode.FAILED_PRECONDITION, "STALE_EPOCH"),
    "NotStaged": (grpc.StatusCode.FAILED_PRECONDITION, "NOT_STAGED"),
    "Draining": (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    "Paused": (grpc.StatusCode.UNAVAILABLE, "PAUSED"),
    "EngineDead": (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD"),
    "QueueFull": (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    "TooManyStreams": (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS"),
    "StageTimeout": (grpc.StatusCode.DEADLINE_EXCEEDED, "STAGE_TIMEOUT"),
    "StageBlocked": (grpc.StatusCode.DEADLINE_EXCEEDED, "STAGE_BLOCKED"),
    "StageCorrupt": (grpc.StatusCode.DATA_LOSS, "STAGE_CORRUPT"),
    "RendezvousUnreachable": (grpc.StatusCode.UNAVAILABLE, "RENDEZVOUS_UNREACHABLE"),
    "Internal": (grpc.StatusCode.INTERNAL, "INTERNAL"),
    "PermissionDenied": (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    "DeadlineExceeded": (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
}
# Said by the client alone.
NEVER_SENT = {errors.Unreachable, errors.MalformedResponse}


def _as_received(error: OutriderError) -> grpc.aio.AioRpcError:
    status = to_status(error)
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    return grpc.aio.AioRpcError(error.code, grpc.aio.Metadata(), trailing, status.message)


def test_no_error_is_missing_from_the_table_or_here() -> None:
    classes = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, OutriderError)}
    named = {cls for cls in classes - {OutriderError} if not cls.__name__.startswith("_")}
    assert {type(error) for error in EVERY_ERROR} == set(errors._BY_REASON.values()) == named - NEVER_SENT


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: type(error).__name__)
def test_every_error_survives_the_wire(error: OutriderError) -> None:
    restored = from_rpc_error(_as_received(error))
    assert type(restored) is type(error)
    assert str(restored) == str(error)
    assert vars(restored) == vars(error)


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: type(error).__name__)
def test_status_is_the_documented_one(error: OutriderError) -> None:
    code, reason = EXPECTED[type(error).__name__]
    status = to_status(error)
    info = error_details_pb2.ErrorInfo()
    assert status.code == code.value[0]
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("outrider", reason)


def test_details_are_the_standard_ones() -> None:
    bad = error_details_pb2.BadRequest()
    to_status(errors.InvalidRequest("sampling.n", "is 0")).details[1].Unpack(bad)
    assert [(v.field, v.description) for v in bad.field_violations] == [("sampling.n", "is 0")]
    failure = error_details_pb2.PreconditionFailure()
    to_status(errors.MediaMissing((b"\x01" * 32,))).details[1].Unpack(failure)
    assert [(v.type, v.subject) for v in failure.violations] == [("MEDIA", "01" * 32)]
    retry = error_details_pb2.RetryInfo()
    to_status(errors.QueueFull(retry_after_s=1.5)).details[1].Unpack(retry)
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (1, 500_000_000)


@pytest.mark.parametrize(
    "error",
    [
        errors.MediaMissing(tuple(bytes([i]) * 32 for i in range(200))),
        errors.InvalidRequest("f", "x" * 100_000),
        errors.InvalidRequest("f", "\N{GRINNING FACE}" * 100_000),
        errors.InvalidRequest("\N{GRINNING FACE}" * 100_000, "x"),
        errors.StaleEpoch("\x01" * 100_000),
        errors.Internal("a\ud800" * 100_000),
    ],
)
def test_a_long_message_fits_into_http2_trailers(error: OutriderError) -> None:
    """Binary values are sent in base64, and of a message all but plain ASCII as %XX."""
    status = to_status(error)
    assert len(quote(status.message)) + len(base64.b64encode(status.SerializeToString())) < 7000


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unreachable),
        (grpc.StatusCode.CANCELLED, errors.Unreachable),
        (grpc.StatusCode.UNKNOWN, errors.Unreachable),
        (grpc.StatusCode.INTERNAL, errors.Unreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.TooLarge),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Unimplemented),
    ],
)
def test_the_transports_own_failures(code: grpc.StatusCode, expected: type[OutriderError]) -> None:
    received = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "words")
    error = from_rpc_error(received)
    assert type(error) is expected
    assert "words" in str(error)


def test_of_a_connection_that_fails_the_cause_is_told() -> None:
    ends = {
        "UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host: Connection refused": "Connection refused",
        "UNKNOWN: Ssl handshake failed": "UNKNOWN: Ssl handshake failed",
    }
    for said, cause in ends.items():
        words = f"failed to connect to all addresses; last error: {said}"
        received = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), words)
        assert str(from_rpc_error(received)) == cause


def test_hostile_details_are_no_crash() -> None:
    garbage = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff"))
    received = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), garbage, "words")
    assert type(from_rpc_error(received)) is errors.Unreachable
    status = to_status(errors.MediaMissing((b"\x01" * 32,)))
    failure = error_details_pb2.PreconditionFailure()
    failure.violations.add(type="MEDIA", subject="not hex")
    status.details[1].Pack(failure)
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    received = grpc.aio.AioRpcError(grpc.StatusCode.FAILED_PRECONDITION, grpc.aio.Metadata(), trailing, "words")
    assert type(from_rpc_error(received)) is errors.MalformedResponse
