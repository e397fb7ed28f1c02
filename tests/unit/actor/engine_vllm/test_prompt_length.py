"""Prompts of the vLLM engine, with a stub of its renderer."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actor.engine import EngineRequest
from actor.engine_vllm.prompts import VllmPrompts
from common.errors import InvalidRequest
from common.types import SamplingParams, TokenPrompt

CONTEXT = 16


class Renderer:
    """Puts `num_added` ids behind a prompt, as the images of one do."""

    mm_processor = None

    def __init__(self, num_added: int) -> None:
        self._num_added = num_added

    async def render_cmpl_async(self, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        added = [7] * self._num_added
        return [{"type": "token", "prompt_token_ids": prompt["prompt_token_ids"] + added} for prompt in prompts]


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], VllmPrompts]:
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda _model: SimpleNamespace())
    config = SimpleNamespace(max_model_len=CONTEXT, hf_config=SimpleNamespace())
    return lambda num_added: VllmPrompts(Path("model"), Renderer(num_added), config, "actor-1", 0)


async def test_min_tokens_need_room_too(prompts: Callable[[int], VllmPrompts]) -> None:
    """Where max_tokens is unset; vLLM ends a completion at the end of the context otherwise."""
    for sampling, fits in (
        (SamplingParams(min_tokens=CONTEXT - 6), True),
        (SamplingParams(min_tokens=CONTEXT - 5), False),
        (SamplingParams(min_tokens=CONTEXT - 5, max_tokens=CONTEXT), True),
    ):
        request = EngineRequest("g", TokenPrompt((5,) * 6), (), sampling)
        if fits:
            await prompts(0).understand(request, with_tensors=True)
            continue
        with pytest.raises(InvalidRequest) as refused:
            await prompts(0).understand(request, with_tensors=True)
        assert str(refused.value) == "sampling.min_tokens: is 11; the prompt leaves room for 10"


@pytest.mark.parametrize("num_added", [0, 6])
async def test_a_prompt_leaves_room_for_a_token(prompts: Callable[[int], VllmPrompts], num_added: int) -> None:
    for num_tokens in (CONTEXT - 1, CONTEXT, CONTEXT + 1):
        request = EngineRequest("g", TokenPrompt((5,) * (num_tokens - num_added)), (), SamplingParams(num_beams=2))
        if num_tokens < CONTEXT:
            info, _ = await prompts(num_added).understand(request, with_tensors=True)
            assert len(info.expanded_ids) == num_tokens
            continue
        with pytest.raises(InvalidRequest) as refused:
            await prompts(num_added).understand(request, with_tensors=True)
        assert str(refused.value) == f"prompt: {num_tokens} tokens leave no room in a context of 16"


async def test_placeholders_without_media_are_refused(prompts: Callable[[int], VllmPrompts]) -> None:
    own = prompts(2)
    own.placeholder_ids = (7, 8)
    with pytest.raises(InvalidRequest) as refused:
        await own.understand(EngineRequest("g", TokenPrompt((5, 8)), (), SamplingParams()), with_tensors=True)
    assert str(refused.value) == "prompt: 3 placeholder tokens, for which there are no media"


async def test_what_vllm_refuses_is_the_callers_mistake_in_one_line(
    prompts: Callable[[int], VllmPrompts], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise ValueError("is too\n long")

    monkeypatch.setattr(Renderer, "render_cmpl_async", refuse)
    with pytest.raises(InvalidRequest, match=r"^prompt: is too long$"):
        await prompts(0).understand(EngineRequest("g", TokenPrompt((5,)), (), SamplingParams()), with_tensors=True)
