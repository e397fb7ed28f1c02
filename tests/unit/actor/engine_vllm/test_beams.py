"""Beams over what vLLM reports, without vLLM."""

import math
from collections.abc import AsyncGenerator, Collection
from types import SimpleNamespace
from typing import Any

import pytest

from actor.engine import EngineRequest
from actor.engine_vllm import beams as module
from actor.engine_vllm.beams import search_beams
from actor.engine_vllm.outputs import NothingSampled
from common.errors import EngineDead, InvalidRequest
from common.types import Completion, SamplingParams, TokenPrompt

EOS = 2


async def _beams(
    likeliest: list[tuple[int, float]],
    sent: list[str] | None = None,
    lacks_media_at: Collection[int] = (),
    **sampling: Any,
) -> list[Completion]:
    """What is found if after every beam the same tokens are the likeliest; `sent` gets what goes with each request."""

    async def generate(longer: Any, _parameters: Any) -> AsyncGenerator[Any, None]:
        if sent is not None:
            sent.append(longer["media"])
            if len(sent) - 1 in lacks_media_at:
                yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason="error", weight_versions=None)])
                return
        places = [likeliest[0], *likeliest]  # the sampled token comes first
        flat = SimpleNamespace(
            start_indices=[0],
            end_indices=[len(places)],
            token_ids=[token_id for token_id, _ in places],
            logprobs=[logprob for _, logprob in places],
        )
        part = SimpleNamespace(
            finish_reason="length", weight_versions=[SimpleNamespace(version="3", start=0, end=1)], logprobs=flat
        )
        yield SimpleNamespace(outputs=[part])

    return await search_beams(
        EngineRequest("g", TokenPrompt((1, 1)), (), SamplingParams(**sampling)),
        {"prompt_token_ids": [1, 1], "media": "tensors"},
        {"prompt_token_ids": [1, 1], "media": "names"},
        max_context_tokens=16,
        eos_ids=(EOS,),
        generate=generate,
    )


@pytest.fixture(autouse=True)
def _no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "extending_params", lambda _wanted: None)


async def test_more_beams_than_there_are() -> None:
    """Two ids are allowed: there are two sequences of one token and four of two."""
    likeliest = [(5, -0.1), (6, -2.3), (7, -math.inf)]
    wanted = {"num_beams": 4, "n": 4, "allowed_token_ids": (5, 6)}
    with pytest.raises(InvalidRequest) as refused:
        await _beams(likeliest, **wanted, max_tokens=1)
    assert str(refused.value) == "sampling.n: is 4; there are only 2 beams"
    found = await _beams(likeliest, **wanted, max_tokens=2)
    assert [beam.token_ids.tolist() for beam in found] == [[5, 5], [5, 6], [6, 5], [6, 6]]
    assert len(await _beams(likeliest, **wanted | {"n": 2}, max_tokens=1)) == 2


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
async def test_no_probability_is_the_engines_fault(logprob: float) -> None:
    """No constraint that goes with beams leaves nothing."""
    with pytest.raises(EngineDead, match="the model gave no finite probability"):
        await _beams([(5, logprob), (6, logprob)], num_beams=1, max_tokens=2, allowed_token_ids=(5, 6))


async def test_media_are_sent_at_the_first_step_and_where_they_are_lacked() -> None:
    wanted = {"num_beams": 1, "max_tokens": 3}
    plain = await _beams([(5, -0.1)], **wanted)
    for lacks_media_at, expected in (
        ((), ["tensors", "names", "names"]),
        ((1,), ["tensors", "names", "tensors", "names"]),
    ):
        sent: list[str] = []
        [beam] = await _beams([(5, -0.1)], sent, lacks_media_at, **wanted)
        assert sent == expected
        assert beam.token_ids.tolist() == plain[0].token_ids.tolist() == [5, 5, 5]


@pytest.mark.parametrize(("lacks_media_at", "num_sent"), [((0,), 1), ((1, 2), 3)])
async def test_a_beam_that_cannot_begin_with_its_media_is_given_up(
    lacks_media_at: Collection[int], num_sent: int
) -> None:
    sent: list[str] = []
    with pytest.raises(NothingSampled):
        await _beams([(5, -0.1)], sent, lacks_media_at, num_beams=1, max_tokens=3)
    assert len(sent) == num_sent
