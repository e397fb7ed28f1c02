"""Prompts and media around vLLM's renderer, which is a stand-in here."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actor.engine import EngineMedia, EngineRequest
from actor.engine_vllm.media import VllmMedia
from actor.engine_vllm.prompts import VllmPrompts
from common.errors import InvalidRequest, TooLarge
from common.types import Modality, SamplingParams, TokenPrompt

_PAD = 9


class _Renderer:
    """One thread, and a cache that answers None for what the worker should have by now."""

    mm_processor = object()

    def __init__(self) -> None:
        self._mm_executor = ThreadPoolExecutor(1)
        self._cached: set[str] = set()
        self.mm_processor_cache = SimpleNamespace(invalidate=self._cached.discard)
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.num_processed = 0

    def get_mm_processor(self) -> Any:
        vision = SimpleNamespace(tokens_per_second=2, temporal_patch_size=2)
        config = SimpleNamespace(vision_config=vision)
        info = SimpleNamespace(get_hf_config=lambda: config, get_supported_mm_limits=lambda: {"video": 1})
        return SimpleNamespace(info=info, data_parser=None)

    async def render_cmpl_async(self, prompts: list[Any]) -> list[Any]:
        loop = asyncio.get_running_loop()
        return [await loop.run_in_executor(self._mm_executor, self._render, prompts[0]["multi_modal_uuids"]["video"])]

    def _render(self, names: list[str]) -> Any:
        [name] = names
        item = None
        if name not in self._cached:
            self.begun.set()
            assert self.may_end.wait(10)
            self._cached.add(name)
            item = self.tensors()
        return self.rendered(name, item)

    def tensors(self) -> Any:
        self.num_processed += 1
        return {"video_grid_thw": SimpleNamespace(data=torch.tensor([4, 2, 2]))}

    def rendered(self, name: str, item: Any) -> Any:
        place = SimpleNamespace(offset=1, length=4, get_num_embeds=lambda: 4)
        return {
            "type": "multimodal",
            "prompt_token_ids": [5, _PAD, _PAD, _PAD, _PAD],
            "mm_hashes": {"video": [name]},
            "mm_placeholders": {"video": [place]},
            "mm_kwargs": {"video": [item]},
        }


@pytest.fixture
def renderer() -> Any:
    renderer = _Renderer()
    yield renderer
    renderer._mm_executor.shutdown()


def _prompts(renderer: _Renderer, monkeypatch: pytest.MonkeyPatch, max_item_tokens: int = 4) -> VllmPrompts:
    media = VllmMedia(renderer, 100)
    monkeypatch.setattr(media, "_assemble", lambda *_: renderer.rendered("00" * 32, renderer.tensors()))
    prompts = VllmPrompts.__new__(VllmPrompts)
    prompts._media, prompts._tokenizing, prompts._actor_id = media, threading.Lock(), "a"
    prompts.placeholder_ids, prompts._max_context_tokens, prompts._max_item_tokens = (_PAD,), 100, max_item_tokens
    return prompts


def _request(frames_per_second: float) -> EngineRequest:
    video = EngineMedia(
        bytes(32), np.zeros((8, 8, 8, 3), np.uint8), modality=Modality.VIDEO, frames_per_second=frames_per_second
    )
    return EngineRequest("g", TokenPrompt((5, _PAD)), (video,), SamplingParams())


@pytest.mark.parametrize("frames_per_second", [8.0, 0.01])
async def test_an_item_whose_first_request_was_cancelled_on_its_way(
    renderer: _Renderer, monkeypatch: pytest.MonkeyPatch, frames_per_second: float
) -> None:
    """The next one finds it in the cache, and nobody has looked at it yet: it is looked at then.

    At 0.01 frames/s, 4 patches of 2 frames take 800 s, and 1600 positions.
    """
    prompts = _prompts(renderer, monkeypatch)
    request = _request(frames_per_second)
    first = asyncio.create_task(prompts.understand(request, with_tensors=False))
    await asyncio.to_thread(renderer.begun.wait, 10)
    second = asyncio.create_task(prompts.understand(request, with_tensors=False))
    while not renderer._mm_executor._work_queue.qsize():  # noqa: ASYNC110 - it comes before the item is forgotten
        await asyncio.sleep(0.001)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    prompts.forget(request.media)
    renderer.may_end.set()
    if frames_per_second < 1:
        with pytest.raises(InvalidRequest, match="makes the videos take 1600 positions; the context has 100"):
            await second
        return
    info, engine_input = await second
    assert info.media[0].grid_thw == (4, 2, 2)
    assert engine_input["mm_kwargs"]["video"] != [None]  # type: ignore[typeddict-item]


async def test_an_item_that_leaves_the_cache_under_a_request(
    renderer: _Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another one fails that brought it: this request is answered all the same."""

    async def left(_prompts: list[Any]) -> list[Any]:
        raise AssertionError("Expected a cached item")

    monkeypatch.setattr(renderer, "render_cmpl_async", left)
    info, engine_input = await _prompts(renderer, monkeypatch).understand(_request(8.0), with_tensors=False)
    assert info.media[0].grid_thw == (4, 2, 2)
    assert engine_input["mm_kwargs"]["video"] != [None]  # type: ignore[typeddict-item]


async def test_what_has_been_looked_at_is_processed_once(renderer: _Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer.may_end.set()
    prompts = _prompts(renderer, monkeypatch)
    for _ in range(3):
        info, _ = await prompts.understand(_request(8.0), with_tensors=False)
        assert info.media[0].grid_thw == (4, 2, 2)
    assert renderer.num_processed == 1


async def test_an_item_that_the_encoder_has_no_room_for(renderer: _Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer.may_end.set()
    with pytest.raises(TooLarge) as refused:
        await _prompts(renderer, monkeypatch, max_item_tokens=3).understand(_request(8.0), with_tensors=False)
    assert str(refused.value) == "media[0]: makes 4 tokens; this server takes items of up to 3"
