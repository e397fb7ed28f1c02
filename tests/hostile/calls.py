"""One call that a server must refuse, as bytes on the wire, with what the refusal has to say; and its parts."""

import random
import re
from dataclasses import dataclass
from typing import Any

import grpc

from common.errors import OutriderError, from_rpc_error
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.types import ServerLimits

GENERATE, PUT_MEDIA = "/rollout.v1.RolloutService/Generate", "/rollout.v1.RolloutService/PutMedia"
WEIGHTS = "/weights.v1.WeightService/"
INT32, INT64, UINT32 = 2**31 - 1, 2**63 - 1, 2**32 - 1
INVALID = frozenset({"INVALID_REQUEST"})


@dataclass(frozen=True, slots=True)
class BadCall:
    """One call. A refusal has one of `reasons`; where that goes with a field, `field` matches the whole of its path.

    Only a message that cannot be taken apart has no field to blame: its `field` is empty.
    """

    kind: str
    method: str
    messages: tuple[bytes, ...]
    field: str
    reasons: frozenset[str]

    def is_answered_by(self, error: OutriderError | None) -> bool:
        """Whether this is the refusal. None stands for an answer."""
        if error is None:
            return "OK" in self.reasons
        field = getattr(error, "field", None)
        return error.reason in self.reasons and (field is None or bool(re.fullmatch(self.field, field)))


async def send(channel: grpc.aio.Channel, call: BadCall, timeout_s: float = 30.0) -> OutriderError | None:
    """What the server says; None if it has answered."""
    kind = {GENERATE: "unary_stream", PUT_MEDIA: "stream_unary"}.get(call.method, "unary_unary")
    method: Any = getattr(channel, kind)(call.method)
    try:
        if kind == "unary_stream":
            async for _ in method(call.messages[0], timeout=timeout_s):
                pass
        else:
            await method(iter(call.messages) if kind == "stream_unary" else call.messages[0], timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    return None


class Maker:
    """Each public method of a subclass makes one kind of bad call, another one each time."""

    def __init__(self, rng: random.Random, limits: ServerLimits, vocab_size: int) -> None:
        self._rng = rng
        self._limits = limits
        self._vocab_size = vocab_size

    def _generate(self, field: str, reasons: tuple[str, ...] = ("INVALID_REQUEST",), **values: Any) -> BadCall:
        prompt = {} if {"chat", "tokens", "text"} & values.keys() else {"text": "hello"}
        message = pb.GenerateRequest(**({"group_id": "bad"} | prompt | values))
        return BadCall("", GENERATE, (message.SerializeToString(),), field, frozenset(reasons))

    def _media(self, field: str, reasons: tuple[str, ...] = ("INVALID_REQUEST",), **values: Any) -> BadCall:
        item = pb.MediaItem(modality=pb.MODALITY_IMAGE, **values)
        return self._generate(field, reasons, media=[item], chat=chat(1))

    def _encoded(self, data: bytes, *reasons: str) -> BadCall:
        return self._media(r"media\[0\]\.encoded", reasons or ("INVALID_REQUEST",), encoded=data)

    def _sampling(self, name: str, **values: Any) -> BadCall:
        sampling = pb.SamplingParams(**({"n": 1, "max_tokens": 2} | values))
        return self._generate(rf"sampling\.{name}.*", sampling=sampling)


def chat(num_media: int, first: int = 0) -> pb.ChatPrompt:
    parts = [pb.ChatPart(media_index=first + i) for i in range(num_media)]
    return pb.ChatPrompt(messages=[pb.ChatMessage(role="user", parts=[*parts, pb.ChatPart(text="What is this?")])])
