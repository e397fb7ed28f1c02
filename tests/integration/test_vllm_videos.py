"""Videos on the real engine: every frame is used, in its place, as transformers uses it."""

import io
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image

from actor.config import ActorConfig
from actor.engine import EngineMedia, VideoArray
from actor.server import ActorServer
from common.chat import template_messages
from common.client import GrpcClient, SampledGroup
from common.errors import InvalidRequest, Unimplemented
from common.media import decode_image, frames_hash
from common.media.placeholders import placeholder_ids
from common.tensors import NamedTensor, pixels_hash, tensor_of, tensors_hash
from common.types import (
    ChatMessage,
    ChatPrompt,
    Frames,
    MediaItem,
    MediaPart,
    Modality,
    RolloutRequest,
    SamplingParams,
    TextPart,
    TokenPrompt,
)
from tests.helpers.enlarged import enlarge
from tests.helpers.groups import image_bytes
from tests.helpers.served_families import build
from tests.integration.live_actor import CONFIG, LiveActor, running
from tests.integration.plain_forward import continued, distribution, plain_model

PARITY = 1e-4
ANSWER: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
# Each starts an engine. Of Qwen2.5-VL, whose positions depend on time, and of what is unlike it.
FAMILIES = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava_onevision", "minicpm_v"]
# These have to be told how far apart the frames are.
IN_TIME = {"qwen2_5_vl", "qwen3_vl"}
PATCHED = {"qwen2_5_vl", "qwen2_vl"}

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]


def noise(seed: int, frames: int = 4, height: int = 56, width: int = 84) -> VideoArray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def video(array: VideoArray, pace: float | None = 2.0) -> EngineMedia:
    return EngineMedia(pixels_hash(tensor_of(array)), array, modality=Modality.VIDEO, frames_per_second=pace)


def chat(num_media: int, text: str = "what happens?") -> ChatPrompt:
    return ChatPrompt((ChatMessage("user", (*map(MediaPart, range(num_media)), TextPart(text))),))


IMAGE = EngineMedia(bytes([9] * 32), decode_image(image_bytes(7), "image", 2**20))


@dataclass(frozen=True, eq=False)
class Served:
    """One family's engine, and the same checkpoint in transformers."""

    family: str
    actor: LiveActor
    model: Any
    processor: Any

    @property
    def videos(self) -> tuple[EngineMedia, EngineMedia]:
        """Of different sizes; the second has an odd number of frames, where the processor takes both in one call."""
        frames = 4 if self.family in {"llava_onevision", "minicpm_v"} else 5
        return video(noise(1)), video(noise(2, frames=frames, height=112, width=56), 1.5)

    def inputs(self, prompt: ChatPrompt, media: Sequence[EngineMedia]) -> dict[str, Any]:
        """The model's inputs by transformers' own processor."""
        text = self.processor.apply_chat_template(
            template_messages(prompt.messages, [item.modality for item in media]),
            tokenize=False,
            add_generation_prompt=True,
        )
        images = [item.content for item in media if item.modality is Modality.IMAGE]
        videos = [item for item in media if item.modality is Modality.VIDEO]
        arguments: dict[str, Any] = {"images": images} if images else {}
        if videos:
            arguments |= {"videos": [item.content for item in videos], "do_sample_frames": False}
            arguments["video_metadata"] = [
                {
                    "total_num_frames": len(item.content),
                    "fps": item.frames_per_second,
                    "frames_indices": list(range(len(item.content))),
                }
                for item in videos
            ]
        return dict(self.processor(text=[text], return_tensors="pt", **arguments))

    def positions(self, inputs: dict[str, Any]) -> Any:
        """By the rule that the Qwen2-VL families were trained with; None: the model's own.

        Behind a video text goes on after the largest position in it. In transformers 5.19 it goes on after the largest
        of height and width, which is the same only for videos that are short in time.
        """
        if self.family not in PATCHED:
            return None
        vision = self.model.config.vision_config
        seconds = iter(inputs["second_per_grid_ts"]) if "second_per_grid_ts" in inputs else iter(lambda: 1.0, None)
        grids = {kind: iter(inputs.get(f"{name}_grid_thw", ())) for kind, name in ((1, "image"), (2, "video"))}
        columns: list[tuple[int, int, int]] = []
        next_position = 0
        for kind, group in itertools.groupby(inputs["mm_token_type_ids"][0].tolist()):
            start = next_position
            if kind == 0:
                columns += [(start + i, start + i, start + i) for i, _ in enumerate(group)]
            else:
                time, height, width = next(grids[kind]).tolist()
                pace = float(next(seconds)) * getattr(vision, "tokens_per_second", 1) if kind == 2 else 1
                columns += [
                    (start + int(t * pace), start + h, start + w)
                    for t in range(time)
                    for h in range(height // 2)
                    for w in range(width // 2)
                ]
            next_position = max(map(max, columns)) + 1
        return torch.tensor(columns).T[:, None]

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any], token_ids: Any) -> Any:
        """By the plain forward, `[n, V]`: what each sampled token was chosen from."""
        whole = continued(inputs, token_ids)
        positions = self.positions(whole)
        given = {} if positions is None else {"position_ids": positions}
        return self.model(**whole, **given, use_cache=False).logits[0, -len(token_ids) - 1 : -1]

    async def agrees(self, prompt: ChatPrompt, media: tuple[EngineMedia, ...]) -> SampledGroup:
        """The answer to a prompt, which has been found to be that of transformers."""
        inputs = self.inputs(prompt, media)
        group = await self.actor.ask(prompt, media, **ANSWER)
        assert group.prompt.expanded_ids.tolist() == inputs["input_ids"][0].tolist()
        [completion] = group.completions
        suppressed = placeholder_ids(self.model.config)
        logits = self.logits(inputs, completion.token_ids)
        expected = distribution(logits, completion.token_ids, suppressed)[0].numpy()
        np.testing.assert_allclose(completion.logprobs, expected, atol=PARITY)
        logits[:, list(suppressed)] = -torch.inf
        assert completion.token_ids.tolist() == logits.argmax(-1).tolist()
        return group


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=FAMILIES)
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    directory: Path = build(request.param, tmp_path_factory.mktemp(request.param))
    if request.param == "qwen2_5_vl":
        enlarge(AutoModelForImageTextToText.from_pretrained(directory)).save_pretrained(directory)
    settings = {"normalize_on_device": False, "max_videos": 2, "max_video_frames": 8}
    async with running(directory, enable_prefix_caching=request.param != "minicpm_v", **settings) as actor:
        model = plain_model(directory).eval()
        yield Served(request.param, actor, model, AutoProcessor.from_pretrained(directory))


async def test_videos_are_those_of_transformers(served: Served) -> None:
    """One video, two, beside an image, before and behind it; the second time from the caches."""
    for media in (
        served.videos[:1],
        served.videos[1:],
        served.videos,
        (IMAGE, served.videos[0]),
        (served.videos[1], IMAGE),
        served.videos[:1],
    ):
        group = await served.agrees(chat(len(media)), media)
        assert [use.sha256 for use in group.prompt.media] == [item.sha256 for item in media]
        assert [use.modality for use in group.prompt.media] == [item.modality for item in media]
        ends = [0]
        is_media = np.isin(group.prompt.expanded_ids, group.prompt.suppressed_token_ids)
        assert is_media.sum() == sum(use.num_tokens for use in group.prompt.media)
        for use in group.prompt.media:
            start, end = use.placeholder.offset, use.placeholder.offset + use.placeholder.length
            assert start >= ends[-1]
            assert is_media[start:end].sum() == use.num_tokens > 0
            ends.append(end)


async def test_grids_of_videos(served: Served) -> None:
    info = (await served.actor.ask(chat(2), served.videos, max_tokens=1)).prompt
    inputs = served.inputs(chat(2), served.videos)
    expected = inputs["video_grid_thw"].tolist() if "video_grid_thw" in inputs else [[], []]
    assert [list(use.grid_thw) for use in info.media] == expected


async def test_every_frame_counts(served: Served) -> None:
    first = await served.agrees(chat(1), served.videos[:1])
    for place in range(4):
        changed = noise(1)
        changed[place] = noise(50 + place, frames=1)[0]
        other = await served.agrees(chat(1), (video(changed),))
        assert abs(other.completions[0].logprobs[0] - first.completions[0].logprobs[0]) > PARITY


async def test_the_pace_is_that_of_transformers(served: Served) -> None:
    """The same frames at two paces, each twice, so that caches answer; the model sees the difference if it can."""
    answers = [await served.agrees(chat(1), (video(noise(3), pace),)) for pace in (1.0, 4.0, 1.0, 4.0)]
    logprobs = [group.completions[0].logprobs for group in answers]
    np.testing.assert_allclose(logprobs[:2], logprobs[2:], atol=PARITY)
    is_seen = bool(np.abs(logprobs[0] - logprobs[1]).max() > 10 * PARITY)
    assert is_seen is (served.family in IN_TIME)
    without = served.actor.ask(chat(1), (video(noise(3), None),), **ANSWER)
    if served.family not in IN_TIME:
        np.testing.assert_allclose((await without).completions[0].logprobs, logprobs[0], atol=PARITY)
        return
    with pytest.raises(InvalidRequest) as refused:
        await without
    assert refused.value.field == "media[0].frames_per_second"


async def test_positions_of_short_videos_are_those_of_transformers(served: Served) -> None:
    if served.family not in PATCHED:
        pytest.skip("its positions are transformers' own in every test")
    media = (IMAGE, video(noise(5), 12.0), served.videos[0] if served.family == "qwen2_vl" else video(noise(6), 24.0))
    inputs = served.inputs(chat(3), media)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    own, _ = served.model.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})
    assert served.positions(inputs).tolist() == own.tolist()
    await served.agrees(chat(3), media)


async def test_a_video_too_slow_for_the_table_of_positions(served: Served) -> None:
    if served.family != "qwen2_5_vl":
        pytest.skip("positions of this family do not depend on time")
    slow = video(noise(4), 0.005)
    with pytest.raises(InvalidRequest, match="positions; the context has 2048") as refused:
        await served.actor.ask(chat(2), (served.videos[0], slow), **ANSWER)
    assert refused.value.field == "media[1].frames_per_second"
    await served.agrees(chat(1), served.videos[:1])


async def test_expanded_ids_are_the_same_prompt(served: Served) -> None:
    media = (IMAGE, *served.videos)
    expected = await served.actor.ask(chat(3), media, **ANSWER)
    runs = tuple(use.placeholder for use in expected.prompt.media)
    ids = tuple(expected.prompt.expanded_ids.tolist())
    found = await served.actor.ask(TokenPrompt(ids, runs), media, **ANSWER)
    assert found.prompt.media == expected.prompt.media
    _same_answer(found, expected)
    wrong = (runs[0], replace(runs[1], length=runs[1].length - 1), runs[2])
    with pytest.raises(InvalidRequest) as refused:
        await served.actor.ask(TokenPrompt(ids, wrong), media, **ANSWER)
    assert refused.value.field == "tokens.placeholders[1]"


async def test_processed_tensors(served: Served) -> None:
    """Those that come back are those of transformers, and are taken for the video."""
    inputs = served.inputs(chat(1), served.videos[:1])
    names = [name for name in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts") if name in inputs]
    tensors = tuple(NamedTensor(name, tensor_of(np.asarray(inputs[name]))) for name in names)
    item = EngineMedia(tensors_hash(tensors), tensors, modality=Modality.VIDEO)
    if served.family not in PATCHED:
        with pytest.raises(Unimplemented) as refused:
            await served.actor.ask(chat(1), (item,), **ANSWER)
        assert refused.value.field == "media[0].processed.tensors"
        return
    expected = await served.agrees(chat(1), served.videos[:1])
    found = await served.actor.ask(chat(1), (item,), **ANSWER)
    assert found.prompt.expanded_ids.tolist() == expected.prompt.expanded_ids.tolist()
    assert found.prompt.media == (replace(expected.prompt.media[0], sha256=item.sha256),)
    _same_answer(found, expected)
    returned = await served.actor.ask(chat(1), served.videos[:1], return_processed=True, **ANSWER)
    assert {named.name for named in returned.prompt.media[0].processed} == set(names)
    for named in returned.prompt.media[0].processed:
        np.testing.assert_allclose(named.tensor.array(), np.asarray(inputs[named.name]), atol=1e-6)
    _same_answer(returned, expected)
    for i, change in enumerate(
        (replace(tensors[0].tensor, shape=(1, 1), data=bytes(4)), tensor_of(np.array([[0, 4, 4]])))
    ):
        bad = (*tensors[:i], NamedTensor(names[i], change), *tensors[i + 1 :])
        with pytest.raises(InvalidRequest) as wrong:
            await served.actor.ask(chat(1), (replace(item, content=bad),), **ANSWER)
        assert wrong.value.field.startswith(f"media[0].processed.tensors[{i}].tensor")
    if "second_per_grid_ts" in names:
        slow = (*tensors[:2], NamedTensor("second_per_grid_ts", tensor_of(np.array([1e6], np.float32))))
        with pytest.raises(InvalidRequest) as wrong:
            await served.actor.ask(chat(1), (replace(item, content=slow),), **ANSWER)
        assert wrong.value.field == "media[0].processed.tensors[2].tensor.data"


async def test_options_are_those_of_transformers(served: Served) -> None:
    if served.family not in PATCHED:
        pytest.skip("the video processor of this family has other bounds")
    media = (replace(served.videos[1], max_pixels=56 * 56), served.videos[1])
    info = (await served.actor.ask(chat(2), media, max_tokens=1)).prompt
    processor = served.processor.video_processor
    size = {**dict(processor.size), "longest_edge": 56 * 56}
    grids = [
        processor(served.videos[1].content, return_tensors="pt", **options)["video_grid_thw"][0].tolist()
        for options in ({"size": size}, {})
    ]
    assert [list(use.grid_thw) for use in info.media] == grids
    assert grids[0] != grids[1]


async def test_over_the_wire(served: Served) -> None:
    """As frames in files and as pixels, and by hash only: the same video, through a real server."""
    actor = served.actor
    engine = CONFIG.model_copy(update={"max_videos": 2, "max_video_frames": 8})
    server = ActorServer(actor.engine, actor.info, ActorConfig(standalone=True, vllm=engine), "actor-1")
    client = GrpcClient(f"127.0.0.1:{await server.start('127.0.0.1:0')}", inline_max_bytes=20_000)
    array = noise(8)
    frames = Frames(tuple(_png(frame) for frame in array))
    pixels = tensor_of(array)
    assert sum(map(len, frames.files)) > 20_000  # so they are uploaded, in chunks
    items = [
        MediaItem(frames_hash(frames), modality=Modality.VIDEO, frames=frames, frames_per_second=2.0),
        MediaItem(pixels_hash(pixels), modality=Modality.VIDEO, pixels=pixels, frames_per_second=2.0),
    ]
    try:
        expected = await served.agrees(chat(1), (video(array),))
        assert (await client.server_info()).limits.max_videos == 2
        for item in items:
            for _ in range(2):
                request = RolloutRequest("g", chat(1), (item,), SamplingParams(**ANSWER))
                group = await client.generate(request, timeout_s=60)
                assert [(use.sha256, use.modality) for use in group.prompt.media] == [(item.sha256, Modality.VIDEO)]
                assert group.prompt.media[0].grid_thw == expected.prompt.media[0].grid_thw
                _same_answer(group, expected)
            assert client.holds([item.sha256])
    finally:
        await client.close()
        await server.stop(grace_s=0)


def _png(frame: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="PNG")
    return file.getvalue()


def _same_answer(found: SampledGroup, expected: SampledGroup) -> None:
    [one], [other] = found.completions, expected.completions
    assert one.token_ids.tolist() == other.token_ids.tolist()
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=PARITY)
