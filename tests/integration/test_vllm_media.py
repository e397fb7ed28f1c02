"""Every form in which an image can come, on the real engine: the same image gives the same answer in all of them."""

import asyncio
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from actor.config import ActorConfig
from actor.engine import EngineMedia
from actor.server import ActorServer
from common.arrays import rollout_arrays
from common.client import GrpcClient, SampledGroup
from common.errors import InvalidRequest
from common.media import content_hash
from common.tensors import NamedTensor, pixels_hash, tensor_of, tensors_hash
from common.types import (
    ChatMessage,
    ChatPrompt,
    MediaItem,
    PlaceholderRange,
    RolloutRequest,
    SamplingParams,
    TextPart,
    TextPrompt,
    TokenPrompt,
)
from learner.batch.processing import PromptProcessor
from learner.rollouts.tripwire import check_images
from learner.types import PixelBounds
from tests.helpers.groups import IMAGE_PAD, SUPPRESSED, image_bytes, sample
from tests.integration.live_actor import CONFIG, LiveActor, media_of, running

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

PARITY = 1e-4
# Two images of different sizes, the second too large for the model's own bounds.
IMAGES = (image_bytes(1, 56, 112), image_bytes(2, 300, 280))
PROMPT = sample(0, "compare", IMAGES)
CHAT = ChatPrompt(PROMPT.messages)
ANSWER: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine_settings() -> dict[str, Any]:
    return {"normalize_on_device": False}


# ------------------------------------------------------------------------------------------------------ expanded ids


async def test_expanded_ids_are_the_same_prompt(actor: LiveActor) -> None:
    expected = await actor.ask(CHAT, media_of(IMAGES), **ANSWER)
    ids = tuple(expected.prompt.expanded_ids.tolist())
    runs = tuple(use.placeholder for use in expected.prompt.media)
    found = await actor.ask(TokenPrompt(ids, runs), media_of(IMAGES), **ANSWER)
    assert found.prompt.expanded_ids.tolist() == list(ids)
    assert found.prompt.unexpanded_ids.tolist() == []
    assert found.prompt.media == expected.prompt.media
    _same_answer(found, expected)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda ids, runs: (ids, (runs[0], replace(runs[1], length=runs[1].length - 1))), "tokens.placeholders[1]"),
        (lambda ids, runs: (ids, (replace(runs[0], offset=runs[0].offset - 1), runs[1])), "tokens.placeholders[0]"),
        # One token too few: the prompt of a smaller image.
        (
            lambda ids, runs: (
                ids[: runs[0].offset] + ids[runs[0].offset + 1 :],
                (replace(runs[0], length=runs[0].length - 1), replace(runs[1], offset=runs[1].offset - 1)),
            ),
            "tokens.placeholders[0]",
        ),
        # One too many, outside every range.
        (lambda ids, runs: ((*ids, IMAGE_PAD), runs), "prompt"),
        # The places of the two are swapped.
        (
            lambda ids, runs: (
                ids[: runs[0].offset]
                + (IMAGE_PAD,) * runs[1].length
                + ids[runs[0].offset + runs[0].length : runs[1].offset]
                + (IMAGE_PAD,) * runs[0].length
                + ids[runs[1].offset + runs[1].length :],
                (
                    PlaceholderRange(runs[0].offset, runs[1].length),
                    PlaceholderRange(runs[1].offset + runs[1].length - runs[0].length, runs[0].length),
                ),
            ),
            "tokens.placeholders[0]",
        ),
    ],
    ids=["shorter", "moved", "smaller", "stray", "swapped"],
)
async def test_ranges_that_are_not_what_the_processor_yields(actor: LiveActor, change: Any, problem: str) -> None:
    info = (await actor.ask(CHAT, media_of(IMAGES), max_tokens=1)).prompt
    ids, runs = change(tuple(info.expanded_ids.tolist()), tuple(use.placeholder for use in info.media))
    with pytest.raises(InvalidRequest) as refused:
        await actor.ask(TokenPrompt(ids, runs), media_of(IMAGES), **ANSWER)
    assert refused.value.field == problem
    assert len((await actor.ask(CHAT, media_of(IMAGES), max_tokens=1)).completions) == 1


async def test_placeholders_and_images_that_do_not_match(actor: LiveActor) -> None:
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    new = (image_bytes(11, 56, 112), image_bytes(12))  # nothing knows them yet
    for text, media in ((pad * 2, media_of(new[:1])), (pad, ()), (pad, media_of(new)), ("none", media_of(new))):
        with pytest.raises(InvalidRequest) as refused:
            await actor.ask(TextPrompt(f"{text} what?"), media, max_tokens=1)
        assert refused.value.field in {"media", "prompt"}
        # What failed has left no trace: an honest request with the same images is answered.
        assert len((await actor.ask(TextPrompt(pad * 2), media_of(new), max_tokens=1)).completions) == 1


async def test_a_request_that_fails_takes_no_other_along(actor: LiveActor) -> None:
    """vLLM's cache believes that the failing request has brought the image to the worker."""
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    for seed in range(20, 24):
        media = media_of([image_bytes(seed)])
        bad = actor.ask(TextPrompt(f"{pad}{pad} what?"), media, max_tokens=1)
        good = [actor.ask(TextPrompt(pad), media, n=4, max_tokens=4) for _ in range(3)]
        refused, *answers = await asyncio.gather(bad, *good, return_exceptions=True)
        assert isinstance(refused, InvalidRequest)
        assert [len(answer.completions) for answer in answers] == [4, 4, 4]


# ------------------------------------------------------------------------------------------------------------ pixels


async def test_pixels_are_the_same_image(actor: LiveActor) -> None:
    """An image of another name, so that no cache can answer for it."""
    expected = await actor.ask(CHAT, media_of(IMAGES), **ANSWER)
    arrays = [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in IMAGES]
    media = tuple(EngineMedia(bytes([7, i] * 16), Image.fromarray(array)) for i, array in enumerate(arrays))
    found = await actor.ask(CHAT, media, **ANSWER)
    assert [use.sha256 for use in found.prompt.media] == [item.sha256 for item in media]
    assert found.prompt.expanded_ids.tolist() == expected.prompt.expanded_ids.tolist()
    _same_answer(found, expected)


# -------------------------------------------------------------------------------------------------- processed tensors


async def test_processed_tensors_are_the_same_image(actor: LiveActor, hf: Any) -> None:
    """What transformers' processor makes of the image, handed over; in chats, in expanded ids, beside an image."""
    expected = await actor.ask(CHAT, media_of(IMAGES), **ANSWER)
    media = tuple(_item(_tensors(hf, image)) for image in IMAGES)
    found = await actor.ask(CHAT, media, **ANSWER)
    assert found.prompt.expanded_ids.tolist() == expected.prompt.expanded_ids.tolist()
    assert [use.grid_thw for use in found.prompt.media] == [use.grid_thw for use in expected.prompt.media]
    assert [use.sha256 for use in found.prompt.media] == [item.sha256 for item in media]
    _same_answer(found, expected)
    ids = tuple(expected.prompt.expanded_ids.tolist())
    runs = tuple(use.placeholder for use in expected.prompt.media)
    _same_answer(await actor.ask(TokenPrompt(ids, runs), media, **ANSWER), expected)
    _same_answer(await actor.ask(CHAT, (media[0], media_of(IMAGES)[1]), **ANSWER), expected)
    # They are what is used, not what they were made of.
    darker = [
        replace_values(named, 0.5) if named.name == "pixel_values" else named for named in _tensors(hf, IMAGES[0])
    ]
    other = await actor.ask(CHAT, (_item(darker), media[1]), **ANSWER)
    assert not np.allclose(other.completions[0].logprobs, expected.completions[0].logprobs, atol=100 * PARITY)


async def test_processed_tensors_come_back(actor: LiveActor, hf: Any) -> None:
    """Also when the engine has them in its cache; and they are taken again as they are."""
    found = await actor.ask(CHAT, media_of(IMAGES), **ANSWER)
    for _ in range(2):
        found = await actor.ask(CHAT, media_of(IMAGES), return_processed=True, **ANSWER)
        for use, image in zip(found.prompt.media, IMAGES, strict=True):
            by_name = {named.name: named.tensor.array() for named in use.processed}
            expected = {named.name: named.tensor.array() for named in _tensors(hf, image)}
            assert sorted(by_name) == sorted(expected) == ["image_grid_thw", "pixel_values"]
            for name, value in expected.items():
                assert by_name[name].dtype == value.dtype
                np.testing.assert_allclose(by_name[name], value, atol=1e-6)
    again = await actor.ask(CHAT, tuple(_item(use.processed) for use in found.prompt.media), **ANSWER)
    _same_answer(again, found)
    assert (await actor.ask(CHAT, media_of(IMAGES), max_tokens=1)).prompt.media[0].processed == ()


def _changed(tensors: list[NamedTensor], name: str, **values: Any) -> list[NamedTensor]:
    return [replace(t, tensor=replace(t.tensor, **values)) if t.name == name else t for t in tensors]


def _grid(tensors: list[NamedTensor], *grid: int) -> list[NamedTensor]:
    data = np.asarray([grid], np.int64)
    return [replace(t, tensor=tensor_of(data)) if t.name == "image_grid_thw" else t for t in tensors]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda tensors: tensors[:1], "media[0].processed.tensors"),
        (lambda tensors: tensors[1:], "media[0].processed.tensors"),
        (lambda tensors: [*tensors, NamedTensor("more", tensors[0].tensor)], "media[0].processed.tensors[2].name"),
        (
            lambda tensors: _changed(tensors, "pixel_values", dtype="I32"),
            "media[0].processed.tensors[0].tensor.dtype",
        ),
        (
            lambda tensors: _changed(tensors, "image_grid_thw", dtype="I32", data=bytes(12)),
            "media[0].processed.tensors[1].tensor.dtype",
        ),
        (
            lambda tensors: _changed(tensors, "pixel_values", shape=(1, *tensors[0].tensor.shape)),
            "media[0].processed.tensors[0].tensor.shape",
        ),
        (
            lambda tensors: _changed(tensors, "pixel_values", shape=tensors[0].tensor.shape[::-1]),
            "media[0].processed.tensors[0].tensor.shape",
        ),
        (
            lambda tensors: _changed(tensors, "pixel_values", shape=(0, 1176), data=b""),
            "media[0].processed.tensors[0].tensor.shape",
        ),
        (lambda tensors: _grid(tensors, 1, 4, 8, 1, 4, 8), "media[0].processed.tensors[1].tensor.shape"),
        (lambda tensors: _grid(tensors, 1, 8, 8), "media[0].processed.tensors[0].tensor.shape"),
        (lambda tensors: _grid(tensors, 2, 4, 4), "media[0].processed.tensors[1].tensor.data"),
        (lambda tensors: _grid(tensors, 1, -4, -8), "media[0].processed.tensors[1].tensor.data"),
        (lambda tensors: _grid(tensors, 1, 0, 8), "media[0].processed.tensors[1].tensor.data"),
        (lambda tensors: _grid(tensors, 1, 32, 1), "media[0].processed.tensors[1].tensor.data"),
        (lambda tensors: _grid(tensors, 1, 2**40, 2**40), "media[0].processed.tensors[1].tensor.data"),
        (lambda tensors: _grid(tensors, 1, 2**12, 2**12), "media[0].processed.tensors[0].tensor.shape"),
    ],
)
async def test_tensors_that_the_model_cannot_take(actor: LiveActor, hf: Any, change: Any, field: str) -> None:
    tensors = _tensors(hf, IMAGES[0])
    assert [named.name for named in tensors] == ["pixel_values", "image_grid_thw"]
    one = ChatPrompt(sample(0, "what?", IMAGES[:1]).messages)
    with pytest.raises(InvalidRequest) as refused:
        await actor.ask(one, (_item(change(tensors)),), **ANSWER)
    assert refused.value.field == field
    assert len((await actor.ask(one, media_of(IMAGES[:1]), max_tokens=1)).completions) == 1


# --------------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    "options", [{"max_pixels": 56 * 56}, {"min_pixels": 112 * 112}, {"min_pixels": 1, "max_pixels": 28 * 28}]
)
async def test_options_are_those_of_transformers(
    actor: LiveActor, model: Any, hf: Any, options: dict[str, int]
) -> None:
    """The same image with and without options in one prompt: each is processed in its own way."""
    media = (replace(media_of(IMAGES)[1], **options), media_of(IMAGES)[1])
    group = await actor.ask(CHAT, media, **ANSWER, return_processed=True)
    size = dict(hf.image_processor.size)
    size["shortest_edge"] = options.get("min_pixels", size["shortest_edge"])
    size["longest_edge"] = options.get("max_pixels", size["longest_edge"])
    image = Image.open(io.BytesIO(IMAGES[1])).convert("RGB")
    inputs = [hf.image_processor(image, return_tensors="pt", size=size), hf.image_processor(image, return_tensors="pt")]
    grids = [each["image_grid_thw"][0].tolist() for each in inputs]
    assert [list(use.grid_thw) for use in group.prompt.media] == grids
    assert grids[0] != grids[1] or "min_pixels" in options
    assert [use.sha256 for use in group.prompt.media] == [item.sha256 for item in media]
    # The model on those tensors.
    [completion] = group.completions
    ids = torch.from_numpy(np.concatenate([group.prompt.expanded_ids, completion.token_ids])).long()[None]
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            pixel_values=torch.cat([each["pixel_values"] for each in inputs]),
            image_grid_thw=torch.cat([each["image_grid_thw"] for each in inputs]),
            mm_token_type_ids=(ids == IMAGE_PAD).long(),
        ).logits[0]
    logits[:, list(SUPPRESSED)] = -torch.inf
    expected = torch.log_softmax(logits[len(group.prompt.expanded_ids) - 1 : -1].double(), -1)
    chosen = expected.gather(1, torch.from_numpy(completion.token_ids).long()[:, None]).squeeze(1)
    np.testing.assert_allclose(completion.logprobs, chosen.numpy(), atol=PARITY)


async def test_bounds_are_those_of_the_learner(actor: LiveActor, model_dir: Path) -> None:
    """Both make the same of a row whose images have different bounds, or none, whatever was asked before."""
    processor = PromptProcessor(model_dir)
    small, large = PixelBounds(max_pixels=56 * 56), PixelBounds(min_pixels=112 * 112)
    num_tokens = set()
    for bounds in ((), (small, PixelBounds()), (small, small), (large, small)):
        row = replace(PROMPT, image_bounds=bounds)
        media = tuple(
            replace(item, min_pixels=given.min_pixels, max_pixels=given.max_pixels)
            for item, (_, given) in zip(media_of(IMAGES), row.bounded_images, strict=True)
        )
        group = await actor.ask(CHAT, media, **ANSWER)
        expected = processor.process(row)
        check_images(expected, group.prompt, group.completions)
        grids = expected.media["image_grid_thw"].tolist()
        assert [list(use.grid_thw) for use in group.prompt.media] == grids
        num_tokens.add(expected.num_image_tokens)
    assert len(num_tokens) == 4


async def test_bounds_that_exclude_each_other(actor: LiveActor) -> None:
    for options, field in (({"min_pixels": 10**6}, "min_pixels"), ({"max_pixels": 100}, "max_pixels")):
        media = (replace(media_of(IMAGES)[0], **options), media_of(IMAGES)[1])
        with pytest.raises(InvalidRequest) as refused:
            await actor.ask(CHAT, media, **ANSWER)
        assert refused.value.field == f"media[0].processor.{field}"


async def test_arguments_of_the_template_are_those_of_the_learner(
    actor: LiveActor, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that thinks if it is told to, on both sides."""
    learner, engine = PromptProcessor(model_dir), actor.vllm._prompts
    template = learner._processor.chat_template + "{% if think %}{{ 'at most ' ~ think }}{% endif %}"
    for processor in (learner._processor, engine._processor):
        monkeypatch.setattr(processor, "chat_template", template)
    lengths = []
    for arguments in ({}, {"think": 5}, {"think": "twelve"}):
        row = replace(PROMPT, template_arguments=arguments)
        group = await actor.ask(row.chat, media_of(IMAGES), **ANSWER)
        check_images(learner.process(row), group.prompt, group.completions)
        lengths.append(len(group.prompt.expanded_ids))
    assert [length - lengths[0] for length in lengths] == [0, len("at most 5"), len("at most twelve")]
    with pytest.raises(InvalidRequest) as refused:
        await actor.ask(ChatPrompt(PROMPT.messages, {"tools": 3}), media_of(IMAGES), **ANSWER)
    assert refused.value.field == "chat.template_arguments"


# ----------------------------------------------------------------------------------------------------------- the wire


async def test_all_of_it_over_the_wire(actor: LiveActor, model_dir: Path, hf: Any) -> None:
    """The same image as a file, as pixels and as tensors, each sent and then named by hash; and beams."""
    config = ActorConfig(model=model_dir, standalone=True, vllm=CONFIG)
    server = ActorServer(actor.engine, actor.info, config, "actor-1")
    client = GrpcClient(f"127.0.0.1:{await server.start('127.0.0.1:0')}")
    one = ChatPrompt(sample(0, "what?", IMAGES[:1]).messages)
    pixels = tensor_of(np.asarray(Image.open(io.BytesIO(IMAGES[0])).convert("RGB")))
    tensors = tuple(_tensors(hf, IMAGES[0]))
    items = [
        MediaItem(content_hash(IMAGES[0]), IMAGES[0]),
        MediaItem(pixels_hash(pixels), pixels=pixels),
        MediaItem(tensors_hash(tensors), processed=tensors),
    ]
    try:
        groups = []
        for item in items:
            for _ in range(2):
                request = RolloutRequest("g", one, (item,), SamplingParams(**ANSWER, top_logprobs=2))
                groups.append(await client.generate(request, timeout_s=60))
                assert groups[-1].prompt.media[0].sha256 == item.sha256
        for group in groups:
            _same_answer(group, groups[0])
            assert {len(top.token_ids) for top in group.completions[0].top_logprobs} == {2}
        arrays = rollout_arrays(groups, pad_token_id=256)
        assert arrays.responses.tolist() == [groups[0].completions[0].token_ids.tolist()] * 6
        sampling = SamplingParams(n=2, num_beams=3, max_tokens=5)
        beams = await client.generate(RolloutRequest("b", one, tuple(items[2:]), sampling), timeout_s=60)
        assert [completion.beam is not None for completion in beams.completions] == [True, True]
    finally:
        await client.close()
        await server.stop(grace_s=0)


# ------------------------------------------------------------------------------------------------------------- parts


def _tensors(hf: Any, image: bytes) -> list[NamedTensor]:
    output = hf.image_processor(Image.open(io.BytesIO(image)).convert("RGB"), return_tensors="np")
    return [NamedTensor(name, tensor_of(output[name])) for name in ("pixel_values", "image_grid_thw")]


def _item(tensors: Any) -> EngineMedia:
    return EngineMedia(tensors_hash(tensors), tuple(tensors))


def replace_values(named: NamedTensor, factor: float) -> NamedTensor:
    return NamedTensor(named.name, tensor_of(named.tensor.array().astype(np.float32) * np.float32(factor)))


def _same_answer(found: SampledGroup, expected: SampledGroup) -> None:
    [one], [other] = found.completions, expected.completions
    assert one.token_ids.tolist() == other.token_ids.tolist()
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=PARITY)


async def test_a_model_without_a_chat_template(model_dir: Path, tmp_path: Path) -> None:
    """It starts, and takes text and token ids."""
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare)
    for name in ("chat_template.jinja", "chat_template.json"):
        (bare / name).unlink(missing_ok=True)
    async with running(bare) as actor:
        for prompt in (TextPrompt("<|image_pad|> what is this?"), TokenPrompt((IMAGE_PAD, 5))):
            assert (await actor.ask(prompt, media_of(IMAGES[:1]), **ANSWER)).completions
        with pytest.raises(InvalidRequest, match="the model has no chat template") as refused:
            await actor.ask(ChatPrompt((ChatMessage("user", (TextPart("hi"),)),)), **ANSWER)
        assert refused.value.field == "chat"
