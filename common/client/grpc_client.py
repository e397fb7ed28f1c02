"""`ActorClient` over gRPC."""

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import grpc
import numpy as np

from common import wire
from common.client.interface import SampledGroup, ignore
from common.client.known_media import KnownMedia
from common.config import ConfigError
from common.errors import DeadlineExceeded, MalformedResponse, MediaMissing, QueueFull, Unreachable, from_rpc_error
from common.media import media_hash
from common.pb.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from common.pb.weights.v1 import weights_pb2, weights_pb2_grpc
from common.rpc.channel import open_channel
from common.rpc.options import DEFAULT_MAX_MESSAGE_BYTES
from common.rpc.tls import Certificates, read_certificates, stamp_of
from common.types import (
    ActorStatus,
    Completion,
    EpochSpec,
    Frames,
    Manifest,
    PromptInfo,
    RolloutRequest,
    ServerInfo,
)

CHUNK_BYTES = 2**20
# The server's own error, with its reason, should arrive before the deadline of the call.
_SLACK_S = 2.0
# How long calls on a connection with old certificates may go on.
_OLD_CALLS_S = 3600.0
# Sums of exponentials are not exact: the logprob of a token that is certain may come out a little above 0.
_MAX_LOGPROB = 1e-3
_CLOSED = "the connection was closed"

_last_manifest: tuple[Manifest | None, weights_pb2.Manifest] = None, weights_pb2.Manifest()

T = TypeVar("T")


class GrpcClient:
    """`ActorClient` over gRPC. Belongs to one event loop.

    Args:
        address: "host:port".
        tls: the directory of certificates, see `common.rpc.tls`; None: plaintext. When they change, the next call
            makes a new connection; what runs on the old one may finish.
        inline_max_bytes: media of one request beyond this are uploaded in chunks first, so that no single message
            blocks the event loops of both ends.
        max_message_bytes: of one message, either way. What the actor allows beyond this does not arrive.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: Path | None = None,
        inline_max_bytes: int = 2**20,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        self.address = address
        self._inline_max_bytes = inline_max_bytes
        self._max_message_bytes = max_message_bytes
        self._tls = tls
        self._certificates: Certificates | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._open()
        self._known_media = KnownMedia()

    # --------------------------------------------------------------------------------------------------- rollouts

    async def generate(
        self, request: RolloutRequest, *, timeout_s: float, on_progress: Callable[[], None] = ignore
    ) -> SampledGroup:
        """See `ActorClient.generate`. Raises `MalformedResponse` for an answer that is not whole.

        `timeout_s` bounds all of it: waiting for another group that sends the same media, the upload, the answer, and a
        second try where the actor lacked media.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._generate(request, timeout_s, on_progress)
        except TimeoutError:
            raise DeadlineExceeded(f"group {request.group_id}: no whole answer after {timeout_s:g} s") from None

    async def _generate(
        self, request: RolloutRequest, timeout_s: float, on_progress: Callable[[], None]
    ) -> SampledGroup:
        await self._known_media.sent_by_others(_hashes(request), timeout_s)
        try:
            return await self._try(request, timeout_s, on_progress, self._inline_max_bytes)
        except MediaMissing:
            # It evicted some, had no room for them, or is not whom it was. Its list may be cut short: send all. Uploads
            # of a burst can push one another out of its store, again and again; what comes with the request needs none.
            inline_max_bytes = await self._room_in_message(request)
            self._known_media.forget(_hashes(request))  # now: another group may have sent them meanwhile
        try:
            return await self._try(request, timeout_s, on_progress, inline_max_bytes)
        except MediaMissing:
            self._known_media.forget(_hashes(request))
            raise

    async def stream(
        self, request: RolloutRequest, *, timeout_s: float
    ) -> AsyncGenerator[PromptInfo | list[Completion], None]:
        """The events of one group as they come, of a request sent as it is. Closing the iterator cancels the call."""
        with _errors():
            call = self._rollouts.Generate(wire.request_to_proto(request), timeout=timeout_s)
            try:
                async for message in call:
                    yield wire.response_from_proto(_parsed(message))
            finally:
                call.cancel()

    async def put_media(self, items: Sequence[bytes | Frames], *, timeout_s: float = 60.0) -> None:
        """Upload image files, and the frames of videos, in chunks."""
        await self.upload({media_hash(item): item for item in items}, timeout_s=timeout_s)

    async def upload(self, items: Mapping[bytes, bytes | Frames], *, timeout_s: float = 60.0) -> None:
        """As `put_media`, of items whose sha256 are known.

        In two calls: while the server takes in a chunk of one, a chunk of the other is on its way.
        """
        parts = [dict(itertools.islice(items.items(), start, None, 2)) for start in range(min(2, len(items)))]
        calls = [asyncio.ensure_future(self._put(part, timeout_s)) for part in parts]
        try:
            await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def _put(self, items: Mapping[bytes, bytes | Frames], timeout_s: float) -> None:
        response = await _call(self._rollouts.PutMedia(_media_chunks(items), timeout=timeout_s))
        missing = tuple(items.keys() - response.sha256)
        if len(response.sha256) + len(missing) != len(items):
            raise MalformedResponse(f"PutMedia: {len(items)} items were sent, {len(response.sha256)} are stored")
        self._known_media.remember(response.sha256)
        if missing:  # evicted before the call ended
            raise MediaMissing(missing)

    async def server_info(self, *, timeout_s: float = 5.0) -> ServerInfo:
        """See `ActorClient.server_info`."""
        request = rollout_pb2.GetServerInfoRequest()
        return wire.server_info_from_proto(await _call(self._rollouts.GetServerInfo(request, timeout=timeout_s)))

    async def _try(
        self, request: RolloutRequest, timeout_s: float, on_progress: Callable[[], None], inline_max_bytes: int
    ) -> SampledGroup:
        with self._known_media.sending(_hashes(request)):
            prepared = await self._prepare(request, timeout_s, inline_max_bytes)
            return await self._collect(prepared, timeout_s, on_progress)

    async def _collect(
        self, request: RolloutRequest, timeout_s: float, on_progress: Callable[[], None]
    ) -> SampledGroup:
        prompt: PromptInfo | None = None
        completions: dict[int, Completion] = {}
        async with contextlib.aclosing(self.stream(request, timeout_s=timeout_s)) as events:
            async for event in events:
                on_progress()
                if isinstance(event, PromptInfo):
                    if prompt is not None or event.group_id != request.group_id:
                        raise MalformedResponse(f"group {request.group_id}: a prompt message for {event.group_id!r}")
                    prompt = event
                    self._known_media.remember(_hashes(request))  # stored, however the call ends
                    continue
                for completion in event:
                    _check_completion(completion, request, completions)
                    completions[completion.index] = completion
        if prompt is None or len(completions) != request.sampling.n:
            raise MalformedResponse(
                f"group {request.group_id}: {len(completions)} of {request.sampling.n} completions came before the end"
            )
        return SampledGroup(prompt, tuple(completions[i] for i in range(request.sampling.n)))

    # ------------------------------------------------------------------------------------------------------ media

    async def _room_in_message(self, request: RolloutRequest) -> int:
        """Bytes of files that one message has room for, beside the rest of the request."""
        files = [item.content for item in request.media if isinstance(item.content, (bytes, Frames))]
        size = wire.request_to_proto(request).ByteSize() - sum(map(_num_bytes, files))
        limits = (await self.server_info()).limits
        return min(self._max_message_bytes, limits.max_message_bytes) - size

    async def _prepare(self, request: RolloutRequest, timeout_s: float, inline_max_bytes: int) -> RolloutRequest:
        """The request with media by hash where the actor has them, uploaded or inline where it has not."""
        lacking = {item.sha256: item for item in request.media if item.sha256 not in self._known_media}
        files = {sha256: item.content for sha256, item in lacking.items() if isinstance(item.content, (bytes, Frames))}
        inline = set(lacking)
        occurrences = [file for item in request.media if (file := files.get(item.sha256)) is not None]
        if sum(map(_num_bytes, occurrences)) > inline_max_bytes:
            try:
                await self.upload(files, timeout_s=timeout_s)
            except QueueFull as error:  # it may be these that keep each other out
                raise MediaMissing(tuple(files)) from error
            inline -= files.keys()  # tensors are not uploaded: they always come with the request
        media = tuple(item if item.sha256 in inline else item.by_hash() for item in request.media)
        return dataclasses.replace(request, media=media)

    def holds(self, media: Sequence[bytes]) -> bool:
        """See `ActorClient.holds`."""
        return all(map(self._known_media.__contains__, media))

    def forget_media(self) -> None:
        """See `ActorClient.forget_media`."""
        self._known_media.clear()

    # ---------------------------------------------------------------------------------------------------- weights

    async def status(self, *, timeout_s: float = 5.0) -> ActorStatus:
        """See `ActorClient.status`."""
        request = weights_pb2.GetStatusRequest()
        return wire.status_from_proto(await _call(self._weights.GetStatus(request, timeout=timeout_s)))

    async def open_epoch(self, spec: EpochSpec) -> None:
        """See `ActorClient.open_epoch`; the deadline is that of `spec`."""
        await _call(self._weights.OpenEpoch(wire.epoch_to_proto(spec), timeout=spec.timeout_s + _SLACK_S))

    async def stage(self, run_id: str, epoch: int, manifest: Manifest, *, timeout_s: float) -> tuple[int, ...]:
        """See `ActorClient.stage`."""
        request = weights_pb2.StageRequest(
            run_id=run_id, epoch=epoch, manifest=_manifest(manifest), timeout_ms=_ms(timeout_s)
        )
        return tuple((await _call(self._weights.Stage(request, timeout=timeout_s + _SLACK_S))).xxh3)

    async def commit(self, run_id: str, epoch: int, policy_version: int, *, timeout_s: float) -> float:
        """See `ActorClient.commit`. Raises `MalformedResponse` if another version went live."""
        request = weights_pb2.CommitRequest(
            run_id=run_id, epoch=epoch, policy_version=policy_version, timeout_ms=_ms(timeout_s)
        )
        response = await _call(self._weights.Commit(request, timeout=timeout_s + _SLACK_S))
        if response.policy_version != policy_version:
            raise MalformedResponse(f"Commit: version {response.policy_version} is live, not {policy_version}")
        return response.pause_s

    async def abort(self, run_id: str, epoch: int, *, timeout_s: float = 5.0) -> None:
        """See `ActorClient.abort`."""
        await _call(self._weights.Abort(weights_pb2.AbortRequest(run_id=run_id, epoch=epoch), timeout=timeout_s))

    async def close(self) -> None:
        """See `ActorClient.close`."""
        self._is_closed = True
        for task in self._closing:
            task.cancel()
        await self._channel.close(None)

    @property
    def _rollouts(self) -> "rollout_pb2_grpc.RolloutServiceAsyncStub":
        self._renew()
        return self._rollout_stub

    @property
    def _weights(self) -> "weights_pb2_grpc.WeightServiceAsyncStub":
        self._renew()
        return self._weight_stub

    def _open(self) -> None:
        if self._tls is not None:
            self._certificates = read_certificates(self._tls)
        self._channel = open_channel(
            self.address, max_message_bytes=self._max_message_bytes, certificates=self._certificates
        )
        self._rollout_stub = rollout_pb2_grpc.RolloutServiceStub(self._channel)
        self._weight_stub = weights_pb2_grpc.WeightServiceStub(self._channel)

    def _renew(self) -> None:
        """Go over to a new connection where the certificates have changed. Raises Unreachable once it is closed."""
        if self._is_closed:
            raise Unreachable(_CLOSED)
        if self._tls is None or self._certificates is None or stamp_of(self._tls) == self._certificates.stamp:
            return
        old = self._channel
        with contextlib.suppress(ConfigError):  # in the middle of a rotation, perhaps
            self._open()
            task = asyncio.create_task(_close_later(old))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


async def _close_later(channel: grpc.aio.Channel) -> None:
    """Not by `close` with a grace period, which does not see calls behind interceptors."""
    try:
        await asyncio.sleep(_OLD_CALLS_S)
    finally:
        await channel.close(None)


def _check_completion(completion: Completion, request: RolloutRequest, received: Mapping[int, Completion]) -> None:
    where = f"group {request.group_id}, completion {completion.index}"
    if completion.index >= request.sampling.n:
        raise MalformedResponse(f"{where}: only {request.sampling.n} were asked for")
    if completion.index in received:
        raise MalformedResponse(f"{where}: came twice, as {completion.trajectory_id}")
    # Group ids are used once: so no trajectory of one group can be that of another.
    if not completion.trajectory_id.startswith(f"{request.group_id}/{completion.index}/"):
        raise MalformedResponse(f"{where}: is named {completion.trajectory_id!r}, not by its group and index")
    if not len(completion.token_ids):
        raise MalformedResponse(f"{where}: has no tokens")
    if not np.isfinite(completion.logprobs).all():
        raise MalformedResponse(f"{where}: has a logprob that is not finite")
    if completion.logprobs.max() > _MAX_LOGPROB:
        raise MalformedResponse(f"{where}: has a logprob above 0")


def _hashes(request: RolloutRequest) -> list[bytes]:
    return [item.sha256 for item in request.media]


def _files(item: bytes | Frames) -> tuple[bytes, ...]:
    return item.files if isinstance(item, Frames) else (item,)


def _num_bytes(item: bytes | Frames) -> int:
    return sum(map(len, _files(item)))


def _media_chunks(items: Mapping[bytes, bytes | Frames]) -> Iterator[rollout_pb2.PutMediaRequest]:
    for sha256, item in items.items():
        files = _files(item)
        request = rollout_pb2.PutMediaRequest(sha256=sha256, num_bytes=sum(map(len, files)))
        if isinstance(item, Frames):
            request.frame_num_bytes.extend(map(len, files))
        for file in files:
            for offset in range(0, len(file), CHUNK_BYTES):
                request.chunk = file[offset : offset + CHUNK_BYTES]
                yield request
                request = rollout_pb2.PutMediaRequest()


def _manifest(manifest: Manifest) -> weights_pb2.Manifest:
    """Not to be changed: made once for all actors of an update, since 18,000 parameters hold the loop up for 50 ms."""
    global _last_manifest  # noqa: PLW0603 - shared by all clients of the process
    made_of, message = _last_manifest
    if made_of is not manifest:
        message = wire.manifest_to_proto(manifest)
        _last_manifest = manifest, message
    return message


async def _call(call: Awaitable[T]) -> T:
    with _errors():
        return _parsed(await call)


def _parsed(message: T | None) -> T:
    """A message; gRPC gives none for bytes that are none."""
    if message is None:
        raise MalformedResponse("the bytes of a response are no message of its kind")
    return message


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What gRPC raises, as an error of ours."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    except asyncio.CancelledError:
        # gRPC cancels calls itself when their channel is closed: then nobody has asked this task to end.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unreachable(_CLOSED) from None
    except grpc.aio.UsageError:  # between the call and its way to the connection
        raise Unreachable(_CLOSED) from None


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1e3))
