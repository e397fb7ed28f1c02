"""What happens around every call of a server: roles, parsing, exceptions that become statuses, and a count of calls."""
# ruff: noqa: BLE001 - this is the boundary that maps every exception

import asyncio
import inspect
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from common import tracing
from common.errors import DETAILS_KEY, DeadlineExceeded, Internal, InvalidRequest, OutriderError, to_status
from common.log import get_logger
from common.rpc.peers import Context, StreamLimit, names_of, peer_of
from common.rpc.tls import authorize
from common.wire import check_bounds

log = get_logger(__name__)

# How long a response may wait for a caller that is there and does not take it. Calls need not have a deadline.
_TAKE_S = 120.0

Handler = Any  # grpc.RpcMethodHandler: generic in the stubs only


class Activity:
    """When a server was last used; probes of the health service do not count."""

    def __init__(self) -> None:
        self.num_active = 0
        self._last_s = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since the last call ended; 0 while one runs."""
        return 0.0 if self.num_active else time.monotonic() - self._last_s

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count one call for as long as the block runs."""
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1
            self._last_s = time.monotonic()


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Sends an `OutriderError` as its rich status.

    Anything else that a handler raises is a bug: the client gets INTERNAL with a random id, and the log has the
    traceback under that id.
    """

    def __init__(self, activity: Activity, streams: StreamLimit, *, checks_roles: bool = False) -> None:
        """`checks_roles`: what a caller may do depends on its certificate, see `common.rpc.tls`."""
        self.activity = activity
        self._streams = streams
        self._checks_roles = checks_roles

    async def intercept_service(  # type: ignore[override]  # the stubs forget that a method may be unknown
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of one method."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        for kind in ("unary_unary", "stream_unary", "unary_stream", "stream_stream"):
            behavior = getattr(handler, kind)
            if behavior is None:
                continue
            wrap = self._stream if inspect.isasyncgenfunction(behavior) else self._single
            # Parsed here: gRPC itself would answer noise with UNKNOWN and the name of an exception.
            parsing = _parsing_each if kind.startswith("stream") else _parsing
            return getattr(grpc, f"{kind}_rpc_method_handler")(
                wrap(method, behavior, parsing(handler.request_deserializer), is_stream=kind != "unary_unary"),
                None,
                handler.response_serializer,
            )
        return handler

    def _single(
        self, method: str, behavior: Callable[..., Awaitable[Any]], parse: Callable[[Any], Any], *, is_stream: bool
    ) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            with self.activity.call():
                try:
                    with self._admitted(method, context, is_stream=is_stream):
                        return await behavior(parse(request), context)
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    await abort(method, context, error)

        return call

    def _stream(
        self,
        method: str,
        behavior: Callable[..., AsyncGenerator[Any, None]],
        parse: Callable[[Any], Any],
        *,
        is_stream: bool,
    ) -> Callable[..., Awaitable[None]]:
        async def call(request: Any, context: Context) -> None:
            with self.activity.call():
                try:
                    with self._admitted(method, context, is_stream=is_stream):
                        async with aclosing(behavior(parse(request), context)) as responses:
                            async for response in responses:
                                await _send(response, context)
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    await abort(method, context, error)

        return call

    @contextmanager
    def _admitted(self, method: str, context: Context, *, is_stream: bool) -> Iterator[None]:
        """Around the handler of a call that its caller may make. Raises PermissionDenied and TooManyStreams."""
        if self._checks_roles:
            authorize(method, names_of(context))
        with (
            self._streams.stream(peer_of(context)) if is_stream else nullcontext(),
            tracing.call_received(method, context.invocation_metadata() or (), is_stream=is_stream),
        ):
            yield


async def _send(response: Any, context: Context) -> None:
    """Raises DeadlineExceeded: a caller that does not take a response must not hold a slot for ever."""
    try:
        async with asyncio.timeout(_TAKE_S):
            await context.write(response)
    except TimeoutError:
        raise DeadlineExceeded(f"a response was not taken for {_TAKE_S:g} s") from None


def _parsing(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    descriptor = deserialize.__self__.DESCRIPTOR  # type: ignore[attr-defined]  # FromString of a message class

    def parse(data: bytes) -> Any:
        check_bounds(data, descriptor)
        try:
            return deserialize(data)
        except DecodeError:
            raise InvalidRequest("", f"these {len(data)} bytes are no message of this call") from None

    return parse


def _parsing_each(deserialize: Callable[[bytes], Any]) -> Callable[[AsyncIterator[bytes]], AsyncIterator[Any]]:
    parse = _parsing(deserialize)

    async def parse_each(stream: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in stream:
            yield parse(data)

    return parse_each


async def abort(method: str, context: Context, error: Exception) -> NoReturn:
    """End the call with the status of `error`."""
    if not isinstance(error, OutriderError):
        error_id = secrets.token_hex(4)
        log.error("internal error", method=method, error_id=error_id, exc_info=error)
        error = Internal(f"internal error; the server's log has it under {error_id}")
    status = to_status(error)
    await context.abort(error.code, status.message, ((DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError("abort returned")
