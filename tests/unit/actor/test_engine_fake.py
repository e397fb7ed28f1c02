import asyncio
import time

import numpy as np
import pytest
from PIL import Image

from actor.config import FakeConfig
from actor.engine import EngineMedia, EngineRequest
from actor.engine_fake.engine import EOS_ID, FakeEngine
from actor.engine_fake.prompts import PLACEHOLDER_ID
from common.errors import EngineDead, InvalidRequest
from common.types import (
    ChatMessage,
    ChatPrompt,
    Completion,
    FinishReason,
    Manifest,
    MediaPart,
    PromptInfo,
    SamplingParams,
    TextPart,
    TokenPrompt,
    VersionSpan,
)
from tests.helpers.fakes import until

IMAGE = Image.new("RGB", (8, 8))
MEDIA = (EngineMedia(b"\x01" * 32, IMAGE), EngineMedia(b"\x02" * 32, IMAGE))
CHAT = ChatPrompt((ChatMessage("u", (TextPart("ab"), MediaPart(0), MediaPart(1))),))


def _request(**sampling: object) -> EngineRequest:
    params = SamplingParams(**({"n": 4, "max_tokens": 100} | sampling))  # type: ignore[arg-type]
    return EngineRequest("g", CHAT, MEDIA, params, return_text=True)


async def _run(engine: FakeEngine, request: EngineRequest) -> tuple[PromptInfo, list[Completion]]:
    events = [event async for event in engine.generate(request)]
    assert isinstance(events[0], PromptInfo)
    completions = [completion for event in events[1:] for completion in event if isinstance(event, list)]
    return events[0], sorted(completions, key=lambda completion: completion.index)


async def test_prompt_is_expanded() -> None:
    info, _ = await _run(FakeEngine(FakeConfig(tokens_per_image=3, token_s=0), "x"), _request())
    letters = [2 + ord(c) for c in "uab"]
    assert info.unexpanded_ids.tolist() == [*letters, PLACEHOLDER_ID, PLACEHOLDER_ID]
    assert info.expanded_ids.tolist() == [*letters, *[PLACEHOLDER_ID] * 6]
    assert [(use.sha256[0], use.placeholder.offset, use.placeholder.length) for use in info.media] == [
        (1, 3, 3),
        (2, 6, 3),
    ]


async def test_tokens_are_a_function_of_prompt_seed_and_index() -> None:
    engines = [FakeEngine(FakeConfig(token_s=0), actor_id) for actor_id in "xy"]
    (_, first), (_, second) = [await _run(engine, _request(seed=7)) for engine in engines]
    _, shifted = await _run(engines[0], _request(seed=8))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert a.trajectory_id != b.trajectory_id
    # Completion i samples from seed + i.
    for a, b in zip(first[1:], shifted[:-1], strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)


async def test_completions_keep_the_contract() -> None:
    _, completions = await _run(FakeEngine(FakeConfig(token_s=0, mean_tokens=8), "x"), _request(n=64, max_tokens=8))
    lengths = [len(completion.token_ids) for completion in completions]
    assert len(set(lengths)) > 3
    assert max(lengths) == 8
    for completion in completions:
        body = completion.token_ids.tolist()
        assert (completion.finish_reason is FinishReason.STOP) == (body[-1] == EOS_ID)
        if completion.finish_reason is FinishReason.LENGTH:
            assert len(body) == 8
        assert PLACEHOLDER_ID not in body
        assert len(completion.logprobs) == len(body)
        assert (completion.logprobs <= 0).all()
        assert completion.version_spans == (VersionSpan(0, 0, len(body)),)


async def test_lengths_of_a_trace_go_by_the_seed() -> None:
    engine = FakeEngine(FakeConfig(token_s=0, lengths=(3, 50, 7)), "x")
    _, completions = await _run(engine, _request(seed=4, n=4, max_tokens=10))
    assert [len(completion.token_ids) for completion in completions] == [10, 7, 3, 10]
    assert [c.finish_reason is FinishReason.LENGTH for c in completions] == [True, False, False, True]


async def test_spans_follow_commits() -> None:
    engine = FakeEngine(FakeConfig(token_s=0.01), "x")
    asked_s = time.monotonic()
    task = asyncio.create_task(_run(engine, _request(n=1, max_tokens=100, ignore_eos=True)))
    await until(lambda: engine.load().num_running)
    running_s = time.monotonic()
    await asyncio.sleep(0.1)
    engine._updates._staged = Manifest(5, (), (), updates_vision=False)
    before_s = time.monotonic()
    await engine.commit(5)
    after_s = time.monotonic()
    _, [completion] = await task
    old, new = completion.version_spans
    assert (old.policy_version, old.start, new.policy_version, new.end) == (0, 0, 5, 100)
    assert old.end == new.start
    assert (before_s - running_s) / 0.01 <= old.end <= (after_s - asked_s) / 0.01 + 1


async def test_closing_the_iterator_frees_the_slots() -> None:
    engine = FakeEngine(FakeConfig(token_s=1.0, max_num_seqs=3), "x")
    events = engine.generate(_request(n=5, ignore_eos=True))
    assert isinstance(await anext(events), PromptInfo)
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0.01)
    assert (engine.load().num_running, engine.load().num_waiting) == (3, 2)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await events.aclose()  # type: ignore[attr-defined]
    assert (engine.load().num_running, engine.load().num_waiting) == (0, 0)


async def test_it_dies_at_the_configured_group() -> None:
    engine = FakeEngine(FakeConfig(token_s=0, die_at_group=2), "x")
    await _run(engine, _request())
    await engine.check()
    with pytest.raises(EngineDead):
        await _run(engine, _request())
    with pytest.raises(EngineDead):
        await engine.check()


async def test_prompts_that_do_not_fit() -> None:
    engine = FakeEngine(FakeConfig(max_context_tokens=5), "x")
    too_long = EngineRequest("g", TokenPrompt((2,) * 5), (), SamplingParams())
    with pytest.raises(InvalidRequest, match="5 tokens; the context has 5"):
        await anext(engine.generate(too_long))  # before anything is sent
    no_place = EngineRequest("g", TokenPrompt((2,)), MEDIA[:1], SamplingParams())
    with pytest.raises(InvalidRequest, match="1 items came, the prompt has room for 0"):
        await _run(engine, no_place)
