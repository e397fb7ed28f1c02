"""The client's end: one channel per actor."""

from collections.abc import Callable
from typing import Any

import grpc
from grpc.aio import ClientCallDetails

from common import tracing
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
    interceptors: Any = [kind(default_timeout_s) for kind in (_AroundSingle, _AroundStream, _AroundUpload)]
    options = channel_options(max_message_bytes)
    if certificates is None:
        return grpc.aio.insecure_channel(address, options, interceptors=interceptors)
    options.append(("grpc.ssl_target_name_override", ACTOR))
    return grpc.aio.secure_channel(address, channel_credentials(certificates), options, interceptors=interceptors)


class _Around:
    """What happens around every call: a deadline, and a span where one is due."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    async def _call(self, continuation: Callable[..., Any], details: ClientCallDetails, request: Any) -> Any:
        sent = tracing.call_sent(_text(details.method))
        metadata = grpc.aio.Metadata(*(details.metadata or ()), *(sent[0] if sent else ()))
        around = ClientCallDetails(
            method=details.method,
            timeout=self._timeout_s if details.timeout is None else details.timeout,
            metadata=metadata,
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
        )
        call = await continuation(around, request)
        if sent:
            call.add_done_callback(sent[1])
        return call


class _AroundSingle(_Around, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: ClientCallDetails, request: Any
    ) -> Any:
        return await self._call(continuation, client_call_details, request)


class _AroundStream(_Around, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: ClientCallDetails, request: Any
    ) -> Any:
        return await self._call(continuation, client_call_details, request)


class _AroundUpload(_Around, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]
    async def intercept_stream_unary(
        self, continuation: Callable[..., Any], client_call_details: ClientCallDetails, request_iterator: Any
    ) -> Any:
        return await self._call(continuation, client_call_details, request_iterator)


def _text(method: str | bytes) -> str:
    return method.decode() if isinstance(method, bytes) else method
