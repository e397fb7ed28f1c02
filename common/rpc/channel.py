"""The client's end: one channel per actor."""

from collections.abc import Callable
from typing import Any

import grpc
from grpc.aio import ClientCallDetails

from common.rpc.options import DEFAULT_MAX_MESSAGE_BYTES, channel_options
from common.rpc.tls import ACTOR, Certificates, channel_credentials


def open_channel(
    address: str,
    *,
    default_timeout_s: float = 30.0,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    certificates: Certificates | None = None,
) -> grpc.aio.Channel:
    """A channel to `host:port`, plaintext without `certificates`. Nothing is connected until the first call.

    A call that names no timeout gets `default_timeout_s`, so that none can hang for ever.
    """
    # The stubs know only the base class of interceptors.
    interceptors: Any = [kind(default_timeout_s) for kind in (_UnaryDeadline, _StreamDeadline, _UploadDeadline)]
    options = channel_options(max_message_bytes)
    if certificates is None:
        return grpc.aio.insecure_channel(address, options, interceptors=interceptors)
    options.append(("grpc.ssl_target_name_override", ACTOR))
    return grpc.aio.secure_channel(address, channel_credentials(certificates), options, interceptors=interceptors)


def _with_deadline(details: ClientCallDetails, timeout_s: float) -> ClientCallDetails:
    if details.timeout is not None:
        return details
    return ClientCallDetails(
        method=details.method,
        timeout=timeout_s,
        metadata=details.metadata,
        credentials=details.credentials,
        wait_for_ready=details.wait_for_ready,
    )


class _DefaultDeadline:
    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s


class _UnaryDeadline(_DefaultDeadline, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_with_deadline(client_call_details, self.timeout_s), request)


class _StreamDeadline(_DefaultDeadline, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_with_deadline(client_call_details, self.timeout_s), request)


class _UploadDeadline(_DefaultDeadline, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]
    async def intercept_stream_unary(
        self, continuation: Callable[..., Any], client_call_details: ClientCallDetails, request_iterator: Any
    ) -> Any:
        return await continuation(_with_deadline(client_call_details, self.timeout_s), request_iterator)
