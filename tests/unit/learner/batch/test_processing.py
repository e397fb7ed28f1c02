import dataclasses
import hashlib
import io
import json
import queue
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common import wire
from common.chat import render_chat
from common.config import ConfigError
from common.media import decode_image
from common.pb.rollout.v1 import rollout_pb2
from common.types import ChatMessage, ChatPrompt, MediaPart, RolloutRequest, TextPart
from learner.batch import processing
from learner.batch.packing import Row, pack
from learner.batch.processing import PromptProcessor
from learner.types import PixelBounds, ProcessedPrompt, PromptSample
from tests.helpers.groups import image_bytes, mixed_groups, sample


def test_ids_media_and_hashes_are_the_processors_own(processor: PromptProcessor, hf_processor: Any) -> None:
    image = image_bytes(0, 112, 56)
    processed = processor.process(sample(0, "hi", [image]))
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>\n<|im_start|>assistant\n"
    expanded = text.replace("<|image_pad|>", "<|image_pad|>" * 8)  # 8 x 4 patches, merged 2 x 2
    assert processed.input_ids.tolist() == hf_processor.tokenizer(expanded).input_ids
    assert processed.media["image_grid_thw"].tolist() == [[1, 4, 8]]
    assert tuple(processed.media["pixel_values"].shape) == (32, 3 * 2 * 14 * 14)
    assert processed.num_image_tokens == (8,)
    assert processed.media_sha256 == (hashlib.sha256(image).digest(),)
    assert set(processed.media) == {"pixel_values", "image_grid_thw"}


def test_positions_of_prompt_and_completions_are_those_of_transformers(
    processor: PromptProcessor, reference_model: Any
) -> None:
    """The whole sequence through the real model's get_rope_index; the pack continues where the prompt ends."""
    for g in mixed_groups(processor):
        prompt, [first, *_] = g.processed, g.completions
        packed = pack([Row(prompt, (first,), (0.0,))])
        ids = torch.from_numpy(np.concatenate([prompt.input_ids, first.token_ids[:-1]])).long()[None]
        expected, _ = reference_model.model.get_rope_index(
            ids, mm_token_type_ids=(ids == 262).int(), image_grid_thw=prompt.media.get("image_grid_thw")
        )
        assert torch.equal(packed.position_ids, expected[:, 0])


def test_text_has_one_position_after_the_other(processor: PromptProcessor) -> None:
    processed = processor.process(sample(0, "words"))
    assert processed.media == {}
    assert processed.num_image_tokens == ()
    assert processed.position_ids.tolist() == [list(range(len(processed.input_ids)))] * 3
    assert processed.next_position == len(processed.input_ids)


def test_filler_is_the_smallest_image_alone(processor: PromptProcessor) -> None:
    filler = processor.filler
    assert filler is not None
    assert filler.input_ids.tolist() == [262] * 4
    assert filler.media["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert filler.next_position == 2


def test_the_cache_returns_the_same_object_and_keeps_its_bound(model_dir: Path) -> None:
    one = sample(0, "a", [image_bytes(0)])
    again = sample(99, "a", [image_bytes(0)])  # another row of the same content
    roomy = PromptProcessor(model_dir)
    assert roomy.process(one) is roomy.process(again)
    assert roomy.process(one) is not roomy.process(sample(0, "b", [image_bytes(0)]))
    num_bytes = 16 * 1176 * 4  # pixel values alone
    tight = PromptProcessor(model_dir, cache_bytes=2 * num_bytes)
    first = tight.process(one)
    assert tight.process(one) is first
    tight.process(sample(1, "b", [image_bytes(1)]))
    assert tight.process(one) is not first


def test_bounds_resize_each_image_as_the_processor_does_alone(processor: PromptProcessor, hf_processor: Any) -> None:
    """Ids, patches and positions of a prompt in which one image is bounded and another is not."""
    images = [image_bytes(0, 112, 112), image_bytes(1, 112, 56)]
    given = sample(0, "compare", images)
    bounds = (PixelBounds(max_pixels=56 * 56), PixelBounds())
    processed = processor.process(dataclasses.replace(given, image_bounds=bounds))
    size = dict(hf_processor.image_processor.size) | {"longest_edge": 56 * 56}
    alone = [
        hf_processor.image_processor(Image.open(io.BytesIO(image)), return_tensors="pt", **arguments)
        for image, arguments in zip(images, ({"size": size}, {}), strict=True)
    ]
    assert processed.media["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 8]]
    assert torch.equal(processed.media["pixel_values"], torch.cat([each["pixel_values"] for each in alone]))
    assert processed.num_image_tokens == (4, 8)
    # The same as of an image that has this size already: the bounds change nothing else.
    small = processor.process(sample(0, "compare", [image_bytes(2), images[1]]))
    assert processed.input_ids.tolist() == small.input_ids.tolist()
    assert np.array_equal(processed.position_ids, small.position_ids)
    both = processor.process(dataclasses.replace(given, image_bounds=(bounds[0],) * 2))
    assert both.num_image_tokens == (4, 2)


def test_the_cache_knows_bounds_apart(processor: PromptProcessor) -> None:
    given = sample(0, "x", [image_bytes(0, 112, 112)])
    bounded = dataclasses.replace(given, image_bounds=(PixelBounds(max_pixels=56 * 56),))
    assert [processor.process(each).num_image_tokens for each in (given, bounded, given)] == [(16,), (4,), (16,)]


@pytest.mark.parametrize(
    ("bounds", "problem"),
    [
        (PixelBounds(min_pixels=10**6), "images[0].min_pixels: makes the bounds 1000000 to "),
        (PixelBounds(max_pixels=2**25), "images[0]: resized to up to 33554432 pixels, more than the limit of 16777216"),
    ],
)
def test_bounds_that_cannot_be_kept_name_the_row(processor: PromptProcessor, bounds: PixelBounds, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        processor.process(dataclasses.replace(sample(5, "x", [image_bytes(0)]), image_bounds=(bounds,)))
    assert str(caught.value).startswith(f"row 5: {problem}")


def test_a_model_that_does_not_resize_by_pixels_says_so(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = PromptProcessor(model_dir)
    monkeypatch.setattr(type(processor._processor.image_processor), "valid_kwargs", object)
    bounded = dataclasses.replace(sample(5, "x", [image_bytes(0)]), image_bounds=(PixelBounds(max_pixels=99),))
    with pytest.raises(ConfigError, match=r"^row 5: images\[0\]: the processor of this model does not resize by a num"):
        processor.process(bounded)


def test_the_chat_template_gets_its_arguments(model_dir: Path, hf_processor: Any) -> None:
    processor = PromptProcessor(model_dir)
    processor._processor.chat_template += "{% if think %}{{ think + '!' }}{% endif %}"
    given = sample(5, "x")
    texts = []
    for arguments in ({}, {"think": "hard"}):
        ids = processor.process(dataclasses.replace(given, template_arguments=arguments)).input_ids
        texts.append(hf_processor.tokenizer.decode(ids))
    assert texts[1] == texts[0] + "hard!"
    with pytest.raises(ConfigError, match=r"^row 5: chat.template_arguments: TypeError: unsupported operand"):
        processor.process(dataclasses.replace(given, template_arguments={"think": 1}))


def test_tools_are_the_text_that_an_actor_renders(model_dir: Path, hf_processor: Any) -> None:
    """Templates write them out in the order in which they come."""
    processor = PromptProcessor(model_dir)
    processor._processor.chat_template += "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    parameters = {"type": "object", "required": ("y", "x"), "properties": {"y": {"type": "number"}, "x": {}}}
    tools = [{"type": "function", "function": {"name": "zoom", "description": "?", "parameters": parameters}}]
    given = dataclasses.replace(sample(0, "x"), template_arguments={"tools": tools})
    sent = wire.request_to_proto(RolloutRequest("g", given.chat)).SerializeToString()
    prompt = wire.request_from_proto(rollout_pb2.GenerateRequest.FromString(sent)).prompt
    assert isinstance(prompt, ChatPrompt)
    text = render_chat(processor._processor, prompt)
    assert text.endswith(json.dumps(tools[0]))
    assert processor.process(given).input_ids.tolist() == hf_processor.tokenizer(text).input_ids


def test_one_prompt_in_the_processor_keeps_neither_images_nor_completions_waiting(
    model_dir: Path, hf_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another prompt the images are decoded meanwhile, and completions are for their rewards."""
    shared = PromptProcessor(model_dir)
    is_in, may_leave = threading.Event(), threading.Event()
    decoded: queue.Queue[str] = queue.Queue()
    run = shared._run

    def slow_run(*arguments: Any) -> ProcessedPrompt:
        is_in.set()
        assert may_leave.wait(20)
        return run(*arguments)

    def seen_decode(*arguments: Any) -> Any:
        decoded.put(threading.current_thread().name)
        return decode_image(*arguments)

    monkeypatch.setattr(shared, "_run", slow_run)
    monkeypatch.setattr(processing, "decode_image", seen_decode)
    with ThreadPoolExecutor(3) as pool:
        try:
            results = [pool.submit(shared.process, sample(0, "a", [image_bytes(0)]))]
            assert is_in.wait(20)
            decoded.get(timeout=20)
            results.append(pool.submit(shared.process, sample(1, "b", [image_bytes(1)])))
            decoded.get(timeout=20)
            assert pool.submit(shared.decode, hf_processor.tokenizer("hi").input_ids).result(timeout=20) == "hi"
            assert not any(result.done() for result in results)
        finally:
            may_leave.set()
        first, second = (result.result() for result in results)
    assert first.media_sha256 != second.media_sha256


def test_threads_get_what_one_thread_gets(model_dir: Path, processor: PromptProcessor) -> None:
    shared = PromptProcessor(model_dir, cache_bytes=0)
    results: dict[int, list[int]] = {}

    def run(row: int) -> None:
        results[row] = shared.process(sample(row, "x" * (row + 1), [image_bytes(row)])).input_ids.tolist()

    threads = [threading.Thread(target=run, args=(row,)) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in range(8):
        assert results[row] == processor.process(sample(row, "x" * (row + 1), [image_bytes(row)])).input_ids.tolist()


@pytest.mark.parametrize(
    ("parts", "num_images"), [((TextPart("no place"),), 1), ((MediaPart(0),), 0), ((MediaPart(1), MediaPart(0)), 2)]
)
def test_messages_and_images_must_fit_together(
    processor: PromptProcessor, parts: tuple[TextPart | MediaPart, ...], num_images: int
) -> None:
    images = tuple(image_bytes(seed) for seed in range(num_images))
    with pytest.raises(ConfigError, match=r"^row 5: its messages refer to images"):
        processor.process(PromptSample(5, (ChatMessage("user", parts),), images, None))


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (b"GIF89a nonsense", "not an image in PNG, JPEG or WebP format"),
        (image_bytes(0)[:-40], "damaged PNG file: OSError"),
        (
            image_bytes(0, 112, 112),
            "112x112 pixels, more than the limit of 10000; make it smaller, or raise data.max_media_pixels and the "
            "actors' limits.max_media_pixels",
        ),
    ],
    ids=["no image", "truncated", "too large"],
)
def test_an_image_that_cannot_be_read_is_refused_by_the_number_of_its_row(
    model_dir: Path, image: bytes, problem: str
) -> None:
    processor = PromptProcessor(model_dir, max_pixels=10_000)
    broken = sample(5, "x", [image_bytes(1), image])
    with pytest.raises(ConfigError) as caught:
        processor.process(broken)
    assert str(caught.value) == f"row 5: images[1]: {problem}"
    with pytest.raises(ConfigError, match=r"^row 5 of charts: images\[1\]: "):
        processor.process(dataclasses.replace(broken, data_source="charts"))


def test_images_that_do_not_add_up_are_refused_by_the_number_of_their_row(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = PromptProcessor(model_dir)
    monkeypatch.setattr(processor, "_image_token_id", 1)
    with pytest.raises(ConfigError, match=r"^row 5: the processor expanded 1 images to \(4,\) tokens, but the prompt"):
        processor.process(sample(5, "x", [image_bytes(1)]))


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_that_writes_no_image_is_named(file: str, model_dir: Path, tmp_path: Path) -> None:
    """As of a text model: it takes the text of each part, and leaves the rest out without a word."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    text = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    (model / "chat_template.jinja").unlink()
    (model / file).write_text(text if file.endswith("jinja") else json.dumps({"chat_template": text}))
    with pytest.raises(ConfigError) as caught:
        PromptProcessor(model).process(sample(5, "x", [image_bytes(1)]))
    assert str(caught.value) == (
        f"row 5: the chat template ({model / file}) writes no <|image_pad|>, which stands for an image; put the one of "
        "the vision model there that the checkpoint was made from"
    )
