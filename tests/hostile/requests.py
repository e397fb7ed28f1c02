"""Calls that a server must refuse, made from a seed: as bytes on the wire, with what the refusal has to say."""

import dataclasses
import itertools
import json
import math
import random
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from common.errors import OutriderError, from_rpc_error
from common.media import content_hash
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.pb.weights.v1 import weights_pb2
from common.types import ServerLimits
from tests.hostile import images

GENERATE, PUT_MEDIA = "/rollout.v1.RolloutService/Generate", "/rollout.v1.RolloutService/PutMedia"
_WEIGHTS = "/weights.v1.WeightService/"
_INT32, _INT64, _UINT32 = 2**31 - 1, 2**63 - 1, 2**32 - 1


@dataclass(frozen=True, slots=True)
class BadCall:
    """One call. A refusal has one of `reasons`, and names a field that `field` matches as a whole."""

    kind: str
    method: str
    messages: tuple[bytes, ...]
    field: str
    reasons: frozenset[str]

    def is_answered_by(self, error: OutriderError | None) -> bool:
        """Whether this is the refusal. None stands for an answer."""
        if error is None:
            return "OK" in self.reasons
        return error.reason in self.reasons and bool(re.fullmatch(self.field, getattr(error, "field", "")))


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


def bad_calls(seed: int, limits: ServerLimits, vocab_size: int) -> Iterator[BadCall]:
    """Without end, each kind as often as the others."""
    maker = _Maker(random.Random(seed), limits, vocab_size)
    for name in itertools.cycle(KINDS):
        yield dataclasses.replace(getattr(maker, name)(), kind=name)


class _Maker:
    """Each public method is a kind of bad call."""

    def __init__(self, rng: random.Random, limits: ServerLimits, vocab_size: int) -> None:
        self._rng = rng
        self._limits = limits
        self._vocab_size = vocab_size

    # ------------------------------------------------------------------------------------------- files

    def truncated_file(self) -> BadCall:
        return self._encoded(images.truncated(self._rng))

    def damaged_file(self) -> BadCall:
        return self._encoded(images.flipped(self._rng))

    def bomb(self) -> BadCall:
        return self._encoded(images.bomb(self._rng), "TOO_LARGE")

    def bomb_in_the_text(self) -> BadCall:
        return self._encoded(images.text_bomb())

    def promised_pixels(self) -> BadCall:
        return self._encoded(images.liar(self._rng), "INVALID_REQUEST", "TOO_LARGE")

    def animation(self) -> BadCall:
        return self._encoded(images.animation(self._rng))

    def deep_pixels(self) -> BadCall:
        return self._encoded(images.deep(self._rng))

    def no_image(self) -> BadCall:
        return self._encoded(images.foreign(self._rng), "INVALID_REQUEST", "TOO_LARGE")

    def large_file(self) -> BadCall:
        return self._encoded(bytes(self._limits.max_media_bytes + self._rng.randint(1, 99)), "TOO_LARGE")

    def empty_file(self) -> BadCall:
        return self._encoded(b"")

    def one_pixel(self) -> BadCall:
        """No mistake: it may be answered."""
        rng = self._rng
        data = images.picture(rng, rng.choice(("PNG", "JPEG", "WEBP")), size=1)
        return self._media("media.*|prompt", ("OK", "INVALID_REQUEST"), encoded=data)

    # ------------------------------------------------------------------------------------------- hashes

    def wrong_hash(self) -> BadCall:
        picture = images.picture(self._rng)
        return self._media(r"media\[0\]\.sha256", encoded=picture, sha256=self._rng.randbytes(32))

    def short_hash(self) -> BadCall:
        size = self._rng.choice((1, 16, 31, 33, 64))
        return self._media(r"media\[0\]\.sha256", sha256=self._rng.randbytes(size))

    def unknown_hash(self) -> BadCall:
        return self._media("", ("MEDIA_MISSING",), sha256=self._rng.randbytes(32))

    def no_content(self) -> BadCall:
        return self._media(r"media\[0\]\.content")

    def unknown_modality(self) -> BadCall:
        item = pb.MediaItem(encoded=images.picture(self._rng), modality=self._rng.choice((0, 9, 99)))
        return self._generate(r"media\[0\]\.modality", media=[item], chat=_chat(1))

    # ------------------------------------------------------------------------------------------- tensors

    def wrong_pixels(self) -> BadCall:
        rng = self._rng
        dtype: Any = pb.DTYPE_UINT8
        shape, data = [2, 2, 3], bytes(12)
        match rng.randrange(6):
            case 0:
                dtype = rng.choice((0, pb.DTYPE_BOOL, pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16, 77))
                data = bytes(12 * 4)
            case 1:
                shape = rng.choice(([12], [2, 6], [3, 2, 2], [1, 2, 2, 3], [0, 4, 3], []))
            case 2:
                shape = rng.choice(([-1, 4, 3], [2, -2, -3], [_INT64, _INT64, 3], [-(2**63), 2, 3], [2**32, 2**32, 3]))
            case 3:
                data = bytes(rng.choice((0, 11, 13)))
            case 4:
                shape = [1] * rng.randint(4, 40)
            case _:
                return self._media(r"media\[0\]\.pixels.*", pixels=pb.Tensor())
        tensor = pb.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]
        return self._media(r"media\[0\]\.pixels.*", pixels=tensor)

    def wrong_video(self) -> BadCall:
        rng = self._rng
        frames = [images.picture(rng, size=8) for _ in range(3)]
        video: Any = rng.choice(
            (
                {"frames": pb.EncodedFrames()},
                {"frames": pb.EncodedFrames(files=[*frames, images.truncated(rng)])},
                {"frames": pb.EncodedFrames(files=[*frames, images.picture(rng, size=9)])},
                {"frames": pb.EncodedFrames(files=[*frames, images.bomb(rng)])},
                {"frames": pb.EncodedFrames(files=frames[:1] * (self._limits.max_video_frames + 1))},
                {"frames": pb.EncodedFrames(files=[b""] * rng.randint(1, 9000))},
                {"frames": pb.EncodedFrames(files=frames), "frames_per_second": rng.choice((0, -1, math.nan, 1e9))},
                {"encoded": frames[0]},
                {"pixels": pb.Tensor(dtype=pb.DTYPE_UINT8, shape=[2, 2, 3], data=bytes(12))},
                {"pixels": pb.Tensor(dtype=pb.DTYPE_UINT8, shape=[0, 2, 2, 3])},
                {"sha256": rng.randbytes(32), "frames_per_second": math.inf},
            )
        )
        item = pb.MediaItem(modality=pb.MODALITY_VIDEO, **video)
        return self._generate("media.*|", ("INVALID_REQUEST", "TOO_LARGE"), media=[item], chat=_chat(1))

    def frames_of_an_image(self) -> BadCall:
        frames = pb.EncodedFrames(files=[images.picture(self._rng)])
        return self._media(r"media\[0\]\.frames", frames=frames)

    def large_pixels(self) -> BadCall:
        height = self._limits.max_media_pixels // 64 + 1
        tensor = pb.Tensor(dtype=pb.DTYPE_UINT8, shape=[height, 64, 3], data=bytes(height * 64 * 3))
        return self._media(r"media\[0\]\.pixels.*", ("TOO_LARGE",), pixels=tensor)

    def wrong_tensors(self) -> BadCall:
        rng = self._rng
        good = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, 2], data=bytes(16))
        named = pb.NamedTensor(name="pixel_values", tensor=good)
        match rng.randrange(5):
            case 0:
                tensors = []
            case 1:
                tensors = [pb.NamedTensor(name=rng.choice(("", "a b", "../x", "é", "x" * 129, "0x")), tensor=good)]
            case 2:
                tensors = [named, named]
            case 3:
                tensors = [pb.NamedTensor(name=f"t{i}", tensor=good) for i in range(65)]
            case _:
                wrong = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, rng.randint(3, 9)], data=bytes(16))
                tensors = [named, pb.NamedTensor(name="image_grid_thw", tensor=wrong)]
        return self._media(r"media\[0\]\.processed.*", processed=pb.ProcessedMedia(tensors=tensors))

    def tensors_that_are_not_finite(self) -> BadCall:
        rng = self._rng
        value = rng.choice((math.nan, math.inf, -math.inf))
        dtype, code = rng.choice(((pb.DTYPE_FLOAT32, "<f"), (pb.DTYPE_FLOAT64, "<d"), (pb.DTYPE_FLOAT16, "<e")))
        data = bytearray(struct.calcsize(code) * 6)
        struct.pack_into(code, data, rng.randrange(6) * struct.calcsize(code), value)
        tensor = pb.Tensor(dtype=dtype, shape=[2, 3], data=bytes(data))
        if rng.random() < 0.3:
            tensor = pb.Tensor(dtype=pb.DTYPE_BFLOAT16, shape=[1], data=struct.pack("<f", value)[2:])
        processed = pb.ProcessedMedia(tensors=[pb.NamedTensor(name="pixel_values", tensor=tensor)])
        return self._media(r"media\[0\]\.processed.*", processed=processed)

    def wrong_options(self) -> BadCall:
        limit = self._limits.max_media_pixels
        bounds = self._rng.choice(((0, None), (None, 0), (limit + 1, None), (None, 2**64 - 1), (9, 8)))
        options = pb.ProcessorOptions(min_pixels=bounds[0], max_pixels=bounds[1])
        return self._media(r"media\[0\]\.processor.*", encoded=images.picture(self._rng), processor=options)

    # ------------------------------------------------------------------------------------------- sampling

    def huge_n(self) -> BadCall:
        n = self._rng.choice((self._limits.max_group_size + 1, 10**6, _UINT32))
        return self._sampling("n", n=n)

    def sampling_that_is_no_number(self) -> BadCall:
        name = self._rng.choice(_FLOATS)
        beams = {"num_beams": 2} if name == "length_penalty" else {}
        return self._sampling(name, **{name: self._rng.choice((math.nan, math.inf, -math.inf))}, **beams)

    def sampling_out_of_range(self) -> BadCall:
        name, values = self._rng.choice(_OUT_OF_RANGE)
        return self._sampling(name, **{name: self._rng.choice(values)})

    def ids_outside_the_vocabulary(self) -> BadCall:
        name = self._rng.choice(("stop_token_ids", "allowed_token_ids", "bad_token_ids", "logit_bias"))
        bad = self._rng.choice((-1, -_INT32 - 1, self._vocab_size, _INT32))
        return self._sampling(name, **{name: {bad: 1.0} if name == "logit_bias" else [3, bad]})

    def wrong_bias(self) -> BadCall:
        return self._sampling("logit_bias", logit_bias={3: self._rng.choice((math.nan, math.inf, 101.0, -1e30))})

    def too_many_strings(self) -> BadCall:
        name = self._rng.choice(("stop", "bad_words"))
        return self._sampling(name, **{name: self._rng.choice((["x"] * 17, [""], ["x" * 129]))})

    def wrong_structure(self) -> BadCall:
        structure = self._rng.choice(
            (
                pb.StructuredOutput(),
                pb.StructuredOutput(regex=""),
                pb.StructuredOutput(regex="a" * 5000),
                pb.StructuredOutput(json_schema="{" * 20000),
                pb.StructuredOutput(choice=pb.Choice()),
                pb.StructuredOutput(choice=pb.Choice(texts=["a", ""])),
                pb.StructuredOutput(grammar=""),
                pb.StructuredOutput(json_object=False),
            )
        )
        return self._sampling("structured_output", structured_output=structure)

    def too_many_beams(self) -> BadCall:
        num_beams = self._rng.choice((self._limits.max_logprobs // 2 + 1, 10**6, _UINT32))
        return self._sampling("num_beams", num_beams=num_beams)

    # ------------------------------------------------------------------------------------------- prompts

    def nothing(self) -> BadCall:
        return BadCall("", GENERATE, (b"",), "prompt|group_id", _INVALID)

    def no_prompt(self) -> BadCall:
        return self._generate("prompt", text=None)

    def empty_prompt(self) -> BadCall:
        values: Any = self._rng.choice(
            (
                {"text": ""},
                {"tokens": pb.TokenPrompt()},
                {"chat": pb.ChatPrompt()},
                {"chat": pb.ChatPrompt(messages=[pb.ChatMessage()])},
                {"chat": pb.ChatPrompt(messages=[pb.ChatMessage(role="user", parts=[pb.ChatPart()])])},
            )
        )
        return self._generate("text|tokens.*|chat.*", **values)

    def arguments_of_the_template(self) -> BadCall:
        rng = self._rng
        chat = _chat(0)
        bad = (
            json.dumps({rng.choice(("tokenize", "messages", "chat_template", "return_dict")): True}),
            json.dumps({"x": [rng.choice((math.nan, math.inf))]}),
            json.dumps({"x": "y" * 2**16}),
            json.dumps({"x": rng.choice(("\ud800", [[]] * 2**15))}),
            '{"x": 1, "x": 2}',
            rng.choice(("null", "[]", "{", "[" * 2**15, '{"x": 1e999}', '{"x": %s}' % ("9" * 5000))),
        )
        chat.template_arguments = rng.choice(bad)
        return self._generate(r"chat\.template_arguments", chat=chat)

    def ids_of_the_prompt(self) -> BadCall:
        bad = self._rng.choice((-1, -_INT32 - 1, self._vocab_size, _INT32))
        ids = [5] * self._rng.randint(0, 20) + [bad]
        return self._generate(r"tokens\.ids\[\d+\]", tokens=pb.TokenPrompt(ids=ids))

    def long_prompt(self) -> BadCall:
        length = self._limits.max_context_tokens
        if self._rng.random() < 0.5:
            return self._generate(r"tokens\.ids", tokens=pb.TokenPrompt(ids=[5] * (length + 1)))
        return self._generate("text", text="x" * (64 * length + 1))

    def placeholders_that_do_not_match(self) -> BadCall:
        rng = self._rng
        run = pb.PlaceholderRange
        runs = rng.choice(
            (
                [run(offset=0, length=0)],
                [run(offset=9, length=5)],
                [run(offset=_UINT32, length=_UINT32)],
                [run(offset=0, length=2), run(offset=2, length=2)],
                [run(offset=1, length=1)],
            )
        )
        item = pb.MediaItem(modality=pb.MODALITY_IMAGE, encoded=images.picture(rng))
        tokens = pb.TokenPrompt(ids=[5] * 10, placeholders=runs)
        return self._generate(r"tokens\.placeholders.*", tokens=tokens, media=[item])

    def media_that_the_prompt_does_not_hold(self) -> BadCall:
        rng = self._rng
        items = [pb.MediaItem(modality=pb.MODALITY_IMAGE, encoded=images.picture(rng)) for _ in range(2)]
        prompt: Any = rng.choice(
            (
                {"chat": _chat(0)},
                {"chat": _chat(1)},
                {"chat": _chat(3)},
                {"chat": _chat(2, first=1)},
                {"chat": _chat(2, first=_UINT32 - 1)},
                {"tokens": pb.TokenPrompt(ids=[5, 6, 7])},
            )
        )
        return self._generate(r"media|chat\..*|prompt", media=items, **prompt)

    def too_many_media(self) -> BadCall:
        count = self._limits.max_media_items + self._rng.randint(1, 50)
        item = pb.MediaItem(modality=pb.MODALITY_IMAGE, sha256=bytes(32))
        return self._generate("media", media=[item] * count, chat=_chat(count))

    def wrong_name(self) -> BadCall:
        return self._generate("group_id", group_id=self._rng.choice(("", "x" * 129, "x" * 10**5)))

    def version_of_the_past_or_the_future(self) -> BadCall:
        version = self._rng.choice((-1, -_INT64, 10**6, _INT64))
        return self._generate("min_policy_version|", ("INVALID_REQUEST", "WEIGHTS_PENDING"), min_policy_version=version)

    def another_run(self) -> BadCall:
        return self._generate("", ("WEIGHTS_PENDING",), run_id=self._rng.choice(("another", "x" * 10**5)))

    def noise(self) -> BadCall:
        """Bytes that are no message."""
        method = self._rng.choice(
            (GENERATE, PUT_MEDIA, _WEIGHTS + "Stage", _WEIGHTS + "Commit", _WEIGHTS + "OpenEpoch")
        )
        # A length-delimited field that is longer than what follows.
        return BadCall("", method, (b"\x0a\x7f" + self._rng.randbytes(self._rng.randint(0, 99)),), "", _INVALID)

    def large_message(self) -> BadCall:
        size = self._limits.max_message_bytes + 1
        return BadCall("", GENERATE, (bytes(size),), "", frozenset({"TOO_LARGE"}))

    # ------------------------------------------------------------------------------------------- uploads, weights

    def wrong_upload(self) -> BadCall:
        rng, put = self._rng, pb.PutMediaRequest
        picture = images.picture(rng)
        sha256, size = content_hash(picture), len(picture)
        bomb = images.bomb(rng)
        messages: Any = rng.choice(
            (
                [put(chunk=picture)],
                [put(sha256=bytes(31), num_bytes=size, chunk=picture)],
                [put(sha256=rng.randbytes(32), num_bytes=size, chunk=picture)],
                [put(sha256=sha256, num_bytes=size - 1, chunk=picture)],
                [put(sha256=sha256, num_bytes=size + 1, chunk=picture)],
                [put(sha256=sha256, num_bytes=2**63, chunk=picture)],
                [put(sha256=sha256, num_bytes=2**20 + 1, chunk=bytes(2**20 + 1))],
                [put(sha256=content_hash(b"no"), num_bytes=2, chunk=b"no")],
                [put(sha256=content_hash(bomb), num_bytes=len(bomb), chunk=bomb)],
                [put(sha256=sha256, num_bytes=size), put(sha256=sha256, num_bytes=size)],
            )
        )
        data = tuple(message.SerializeToString() for message in messages)
        return BadCall("", PUT_MEDIA, data, "sha256|num_bytes|chunk", _INVALID | {"TOO_LARGE"})

    def wrong_weights(self) -> BadCall:
        rng, parameter = self._rng, weights_pb2.Parameter
        bucket = weights_pb2.Bucket(num_bytes=16)
        manifests = (
            weights_pb2.Manifest(),
            weights_pb2.Manifest(policy_version=-1),
            weights_pb2.Manifest(parameters=[parameter(name="w", dtype="F32", shape=[4])]),
            weights_pb2.Manifest(parameters=[parameter(name="w", dtype="F8", shape=[4])], buckets=[bucket]),
            weights_pb2.Manifest(parameters=[parameter(name="w", dtype="F32", shape=[-4])], buckets=[bucket]),
            weights_pb2.Manifest(parameters=[parameter(name="w", dtype="F32", shape=[_INT64] * 9)], buckets=[bucket]),
            weights_pb2.Manifest(
                parameters=[parameter(name="w", dtype="F32", shape=[4])], buckets=[weights_pb2.Bucket(num_bytes=2**60)]
            ),
        )
        messages: Any = (
            ("Stage", weights_pb2.StageRequest(run_id="r", epoch=1, timeout_ms=9, manifest=rng.choice(manifests))),
            ("Stage", weights_pb2.StageRequest()),
            ("OpenEpoch", weights_pb2.OpenEpochRequest()),
            ("OpenEpoch", weights_pb2.OpenEpochRequest(run_id="r", epoch=1, master_host="h", master_port=70_000)),
            ("Commit", weights_pb2.CommitRequest()),
            ("Commit", weights_pb2.CommitRequest(run_id="another", epoch=-1, policy_version=3, timeout_ms=9)),
        )
        name, message = rng.choice(messages)
        field = "manifest.*|run_id|epoch|master_port|timeout_ms|"
        return BadCall("", _WEIGHTS + name, (message.SerializeToString(),), field, _INVALID | {"STALE_EPOCH"})

    # ------------------------------------------------------------------------------------------- parts

    def _generate(self, field: str, reasons: tuple[str, ...] = ("INVALID_REQUEST",), **values: Any) -> BadCall:
        prompt = {} if {"chat", "tokens", "text"} & values.keys() else {"text": "hello"}
        message = pb.GenerateRequest(**({"group_id": "bad"} | prompt | values))
        return BadCall("", GENERATE, (message.SerializeToString(),), field, frozenset(reasons))

    def _media(self, field: str, reasons: tuple[str, ...] = ("INVALID_REQUEST",), **values: Any) -> BadCall:
        item = pb.MediaItem(modality=pb.MODALITY_IMAGE, **values)
        return self._generate(field, reasons, media=[item], chat=_chat(1))

    def _encoded(self, data: bytes, *reasons: str) -> BadCall:
        return self._media(r"media\[0\]\.encoded", reasons or ("INVALID_REQUEST",), encoded=data)

    def _sampling(self, name: str, **values: Any) -> BadCall:
        sampling = pb.SamplingParams(**({"n": 1, "max_tokens": 2} | values))
        return self._generate(rf"sampling\.{name}.*", sampling=sampling)


def _chat(num_media: int, first: int = 0) -> pb.ChatPrompt:
    parts = [pb.ChatPart(media_index=first + i) for i in range(num_media)]
    return pb.ChatPrompt(messages=[pb.ChatMessage(role="user", parts=[*parts, pb.ChatPart(text="What is this?")])])


_INVALID = frozenset({"INVALID_REQUEST"})
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "length_penalty",
)
_OUT_OF_RANGE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("temperature", (-1.0, 1e-30, 2.5, 101.0)),
    ("top_p", (0.0, -1.0, 1.5)),
    ("top_k", (_UINT32,)),
    ("min_p", (-0.5, 2.0)),
    ("max_tokens", (10**6, _UINT32)),
    ("min_tokens", (3, _UINT32)),
    ("seed", (-1, _INT64)),
    ("repetition_penalty", (0.0, -1.0, 1e9)),
    ("presence_penalty", (-3.0, 1e30)),
    ("frequency_penalty", (-3.0, 1e30)),
    ("top_logprobs", (10**4, _UINT32)),
    ("prompt_top_logprobs", (10**4, _UINT32)),
    ("length_penalty", (1.0,)),  # without beams
    ("repetition_detection", (pb.RepetitionDetection(), pb.RepetitionDetection(max_pattern_size=_UINT32, min_count=2))),
)
KINDS = tuple(name for name in vars(_Maker) if not name.startswith("_"))
