"""`rollout.v1.RolloutService`: from a request on the wire to the engine and back."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from actor.engine import Engine, EngineMedia, EngineRequest
from actor.media.intake import MediaIntake
from actor.media.store import MediaStore
from actor.media.uploads import Uploads
from actor.metrics import ActorMetrics
from actor.validation.request import check_request
from actor.weights.policy_state import PolicyState
from common import tracing
from common.errors import (
    Draining,
    EngineDead,
    InvalidRequest,
    Paused,
    QueueFull,
    TooLarge,
    Unimplemented,
    WeightsPending,
)
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.pb.rollout.v1 import rollout_pb2_grpc
from common.types import ActorState, Completion, PromptInfo, RolloutRequest, ServerInfo
from common.wire import request_from_proto, response_to_proto, server_info_to_proto

Context = Any  # grpc.aio.ServicerContext; nothing of it is used
# A response of some hundred KiB: large ones hold up the event loop.
_MAX_TOKENS_PER_RESPONSE = 2**15
_BYTES_PER_TOKEN = 8
# What takes some milliseconds to put into a message.
_MAX_ALTERNATIVES_ON_LOOP = 2**12


class RolloutService(rollout_pb2_grpc.RolloutServiceServicer):
    """See proto/rollout/v1/rollout.proto. `info` holds the limits; its policy version is filled in when asked for."""

    def __init__(
        self,
        engine: Engine,
        policy: PolicyState,
        info: ServerInfo,
        vocab_size: int,
        store: MediaStore,
        metrics: ActorMetrics,
        max_held_media_bytes: int,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._info = info
        self._vocab_size = vocab_size
        self._intake = MediaIntake(store, info.limits, metrics, max_held_media_bytes)
        self._uploads = Uploads(store, info.limits)
        self._metrics = metrics
        self._num_completions = 0  # accepted and not finished
        self.idle = asyncio.Event()
        self.idle.set()

    def add_to(self, server: grpc.aio.Server) -> str:
        """Register with `server`; the name of the service."""
        rollout_pb2_grpc.add_RolloutServiceServicer_to_server(self, server)
        return pb.DESCRIPTOR.services_by_name["RolloutService"].full_name

    # ------------------------------------------------------------------------------------------------ rollouts

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        """Sample one group."""
        outcome = "refused"
        accepted_at = time.monotonic()
        try:
            self._refuse_unless_serving(request.min_policy_version)
            self._policy.refuse_unless_of(request.run_id)
            rollout = request_from_proto(request)
            del request  # it has the media once more
            check_request(rollout, self._info.limits, self._vocab_size, self._info.suppressed_token_ids)
            with self._accepted(max(rollout.sampling.n, rollout.sampling.num_beams)):
                async with self._intake.taken(rollout.media) as media:
                    outcome = "failed"
                    async with aclosing(self._events(self._engine_request(rollout, media, accepted_at))) as events:
                        async for event in events:
                            self._policy.refuse_unless_of(rollout.run_id)  # a new one may have come meanwhile
                            yield await self._response(event)
            outcome = "finished"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        except (InvalidRequest, TooLarge, Unimplemented, QueueFull, WeightsPending):
            outcome = "refused"  # by the engine
            raise
        finally:
            self._metrics.groups.labels(outcome).inc()

    def _engine_request(
        self, rollout: RolloutRequest, media: tuple[EngineMedia, ...], accepted_at: float
    ) -> EngineRequest:
        return EngineRequest(
            group_id=rollout.group_id,
            prompt=rollout.prompt,
            media=media,
            sampling=rollout.sampling,
            return_text=rollout.return_text,
            return_processed=rollout.return_processed,
            return_routed_experts=rollout.return_routed_experts,
            model=rollout.model,
            max_message_bytes=self._info.limits.max_message_bytes,
            accepted_at=accepted_at,
        )

    async def _events(self, request: EngineRequest) -> AsyncGenerator[PromptInfo | list[Completion], None]:
        """The engine's events; completions that finished together stay together up to a bound on the message."""
        started_ns, started_at = time.time_ns(), time.monotonic()
        first_token_s: list[float] = []
        # The engine's generator is closed with this one, which aborts what still runs.
        generator: Any = self._engine.generate(request)
        async with aclosing(generator):
            async for event in generator:
                if isinstance(event, PromptInfo):
                    yield event
                    continue
                self._metrics.finished(event)
                first_token_s += (completion.first_token_s for completion in event)
                for part in _split(event):
                    yield part
        if first_token_s:
            _trace(started_ns, min(first_token_s) - (started_at - request.accepted_at))

    async def _response(self, event: PromptInfo | list[Completion]) -> pb.GenerateResponse:
        """One message. Raises TooLarge for one that asked for so much that no client would take it."""
        message = await asyncio.to_thread(response_to_proto, event) if _is_long(event) else response_to_proto(event)
        limit = self._info.limits.max_message_bytes
        if message.ByteSize() > limit:
            raise TooLarge("returns", f"a response of {message.ByteSize()} bytes; the limit is {limit}")
        return message

    def _refuse_unless_serving(self, min_policy_version: int) -> None:
        policy = self._policy
        match policy.state:
            case ActorState.DRAINING:
                raise Draining("this actor is draining")
            case ActorState.FAILED:
                raise EngineDead("the engine of this actor has failed")
            case ActorState.PAUSED:
                raise Paused("an operator has paused this actor")
            case ActorState.SERVING if policy.policy_version >= min_policy_version:
                return
            case ActorState.SERVING:
                raise WeightsPending(f"policy version {policy.policy_version} is served, not yet {min_policy_version}")
            case _:
                raise WeightsPending(f"this actor is {policy.state.value}: it waits for the weights of a learner")

    @contextmanager
    def _accepted(self, n: int) -> Iterator[None]:
        """Count a group's completions against the queue for as long as the block runs."""
        limit = self._info.limits.max_queued_completions
        if n > limit:
            raise InvalidRequest("sampling.n", f"is {n}; this actor queues {limit} completions at most")
        if self._num_completions + n > limit:
            raise QueueFull(f"{self._num_completions} completions run or wait; the limit is {limit}")
        self._num_completions += n
        self.idle.clear()
        try:
            yield
        finally:
            self._num_completions -= n
            if not self._num_completions:
                self.idle.set()

    # ------------------------------------------------------------------------------------------------ media

    async def PutMedia(
        self, request_iterator: AsyncIterator[pb.PutMediaRequest], context: Context
    ) -> pb.PutMediaResponse:
        """Store uploaded items."""
        return pb.PutMediaResponse(sha256=await self._uploads.receive(request_iterator))

    # ------------------------------------------------------------------------------------------------ server

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        """What this server is."""
        info = dataclasses.replace(
            self._info, policy_version=self._policy.policy_version, adapters=self._engine.adapters()
        )
        return server_info_to_proto(info)


def _trace(started_ns: int, first_token_s: float) -> None:
    """Of a group that has just finished: from `started_ns` until its first token, and from there on."""
    first_ns = started_ns + round(first_token_s * 1e9)
    tracing.past_span("actor.queue", started_ns, first_ns)
    tracing.past_span("actor.generate", first_ns, time.time_ns())


def _is_long(event: PromptInfo | list[Completion]) -> bool:
    """Whether making a message of it would hold up the calls of others: alternatives can take seconds."""
    if isinstance(event, PromptInfo):
        return bool(event.prompt_top_logprobs) or any(use.processed for use in event.media)
    return sum(map(_num_alternatives, event)) > _MAX_ALTERNATIVES_ON_LOOP


def _num_alternatives(completion: Completion) -> int:
    return sum(len(top.token_ids) for top in completion.top_logprobs)


def _split(completions: list[Completion]) -> Iterator[list[Completion]]:
    part: list[Completion] = []
    num_tokens = 0
    for completion in completions:
        size = len(completion.token_ids) + _num_alternatives(completion)
        if completion.routed_experts is not None:
            size += len(completion.routed_experts.data) // _BYTES_PER_TOKEN
        if part and num_tokens + size > _MAX_TOKENS_PER_RESPONSE:
            yield part
            part, num_tokens = [], 0
        part.append(completion)
        num_tokens += size
    if part:
        yield part
