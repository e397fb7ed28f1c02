"""Parts of the vLLM engine that need no vLLM."""

import math
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from vllm.exceptions import QueueOverflowError

from actor.config import VllmConfig
from actor.engine import EngineMedia, EngineRequest
from actor.engine_vllm import engine as module
from actor.engine_vllm import outputs, probes
from actor.engine_vllm.engine import VllmEngine
from actor.engine_vllm.outputs import NoProbability, NothingSampled, top_logprobs
from common.config import ConfigError
from common.errors import EngineDead, InvalidRequest, QueueFull, TooLarge
from common.types import (
    Constraint,
    Manifest,
    ManifestParameter,
    PromptInfo,
    SamplingParams,
    StructuredOutput,
    TextPrompt,
    TopLogprobs,
)

# Of a prompt of two tokens: nothing for the first, and the second one's own logprob before its likeliest.
FLAT = SimpleNamespace(start_indices=[0, 0], end_indices=[0, 3], token_ids=[7, 9, 7], logprobs=[-2.0, -0.5, -2.0])


class Flat(SimpleNamespace):
    """As vLLM's: one place for each token."""

    def __len__(self) -> int:
        return len(self.start_indices)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    """It is asked for no more than the logprobs of a prompt."""

    async def outputs(*_: Any) -> AsyncIterator[Any]:
        part = SimpleNamespace(weight_versions=[SimpleNamespace(version="4", start=0, end=1)])
        yield SimpleNamespace(prompt_logprobs=Flat(**vars(FLAT)), outputs=[part])

    made = VllmEngine(Path("model"), VllmConfig(), "actor-1")
    monkeypatch.setattr(made, "_outputs", outputs)
    monkeypatch.setattr(module, "scoring_params", lambda _num_top: None)
    return made


async def _scored(engine: VllmEngine, num_tokens: int = 2, **sampling: Any) -> PromptInfo:
    ids = np.full(num_tokens, 7, np.int32)
    request = EngineRequest("g", TextPrompt("x"), (), SamplingParams(**sampling))
    engine_input: Any = {}
    return await engine._score_prompt(request, PromptInfo("g", "actor-1", ids, ids), engine_input)


async def test_only_the_logprobs_that_were_asked_for(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    both = await _scored(engine, prompt_logprobs=True, prompt_top_logprobs=2)
    assert both.prompt_logprobs == (0.0, -2.0)
    assert both.prompt_logprobs_policy_version == 4
    assert both.prompt_top_logprobs == (TopLogprobs(), TopLogprobs((9, 7), (-0.5, -2.0)))
    top = await _scored(engine, prompt_top_logprobs=2)
    assert (top.prompt_logprobs, top.prompt_top_logprobs) == ((), both.prompt_top_logprobs)
    monkeypatch.setattr(module, "top_logprobs", None)  # not even looked at
    own = await _scored(engine, prompt_logprobs=True)
    assert (own.prompt_logprobs, own.prompt_top_logprobs) == (both.prompt_logprobs, ())


async def test_a_bound_of_vllms_own_on_what_waits_is_told_as_ours() -> None:
    """`vllm.extra` can set some."""

    async def refuse(*_: Any, **__: Any) -> AsyncIterator[Any]:
        for error in (QueueOverflowError(),):
            raise error
        yield

    engine = VllmEngine(Path("model"), VllmConfig(), "actor-1")
    engine._engine = SimpleNamespace(generate=refuse)  # type: ignore[assignment]
    request = EngineRequest("g", TextPrompt("x"), (), SamplingParams())
    parameters = SimpleNamespace(structured_outputs=None)
    with pytest.raises(QueueFull, match="cannot accept new requests"):
        [_ async for _ in engine._outputs(cast("Any", {}), cast("Any", parameters), request)]


async def test_they_are_made_beside_the_loop(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def made(flat: Any, place: int) -> TopLogprobs:
        threads.append(threading.current_thread())
        return top_logprobs(flat, place)

    monkeypatch.setattr(module, "top_logprobs", made)
    await _scored(engine, prompt_top_logprobs=2)
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


async def test_so_are_the_alternatives_of_completions(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32,000 tokens with 20 each they take a third of a second."""
    threads = []

    def made(flat: Any, place: int) -> TopLogprobs:
        threads.append(threading.current_thread())
        return top_logprobs(flat, place)

    async def reported(*_: Any) -> AsyncIterator[Any]:
        flat = SimpleNamespace(start_indices=[0], end_indices=[3], token_ids=[7, 9, 7], logprobs=[-2.0, -0.5, -2.0])
        ended: dict[str, Any] = {"finish_reason": "stop", "stop_reason": None, "weight_versions": [], "text": ""}
        yield SimpleNamespace(
            outputs=[SimpleNamespace(index=index, token_ids=[7], logprobs=flat, **ended) for index in (1, 0)]
        )

    monkeypatch.setattr(outputs, "top_logprobs", made)
    monkeypatch.setattr(module, "sampling_params", lambda _wanted, **_: None)
    monkeypatch.setattr(engine, "_outputs", reported)
    for num_top in (0, 2):
        request = EngineRequest("g", TextPrompt("x"), (), SamplingParams(n=2, top_logprobs=num_top))
        [completions] = [event async for event in engine._sample(request, cast("Any", {}))]
        assert [completion.index for completion in completions] == [1, 0]
        expected = (TopLogprobs((9, 7), (-0.5, -2.0)),) if num_top else ()
        assert {completion.top_logprobs for completion in completions} == {expected}
    assert len(threads) == 2
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("logprobs", [[math.nan, -0.5, -2.0], [-math.inf, -0.5, -2.0], [-2.0, math.nan, -2.0]])
async def test_a_prompt_without_probability_is_the_engines_fault(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, logprobs: list[float]
) -> None:
    monkeypatch.setattr(FLAT, "logprobs", logprobs)
    with pytest.raises(EngineDead, match="the model gave no finite probability"):
        await _scored(engine, prompt_logprobs=True, prompt_top_logprobs=2)


STRUCTURED = SamplingParams(structured_output=StructuredOutput(Constraint.REGEX, "a"))


@pytest.mark.parametrize(("probability", "error"), [(-0.5, InvalidRequest), (math.nan, EngineDead), (None, EngineDead)])
async def test_the_model_is_asked_without_the_constraints_that_left_nothing(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, probability: float | None, error: type[Exception]
) -> None:
    """A learner drops a group that is at fault itself; one of an engine at fault it has sampled elsewhere."""
    asked: list[list[int]] = []

    async def sample_twice(request: EngineRequest, _engine_input: Any) -> AsyncIterator[Any]:
        if request.sampling.n:
            raise NoProbability([8, 9])
        yield

    async def understand(_request: Any, *, with_tensors: bool) -> tuple[PromptInfo, Any]:
        return PromptInfo("g", "actor-1", np.empty(0, np.int32), np.empty(0, np.int32)), {"prompt_token_ids": [7]}

    async def probed(engine_input: Any, parameters: Any, request: EngineRequest) -> AsyncIterator[Any]:
        assert parameters == "unconstrained"
        asked.append(engine_input["prompt_token_ids"])
        flat = None if probability is None else SimpleNamespace(logprobs=[probability])
        yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=flat)])

    monkeypatch.setattr(probes, "probing_params", lambda: "unconstrained")
    monkeypatch.setattr(engine, "_sample_twice", sample_twice)
    monkeypatch.setattr(engine, "_outputs", probed)
    monkeypatch.setattr(
        engine, "_prompts", SimpleNamespace(understand=understand, forget=lambda _media: None), raising=False
    )
    with pytest.raises(error):
        async for _ in engine.generate(EngineRequest("g", TextPrompt("x"), (), STRUCTURED)):
            pass
    assert asked == [[7, 8, 9]]


async def test_too_many_logprobs_are_refused_before_the_model_runs(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_outputs", None)
    with pytest.raises(TooLarge) as refused:
        await _scored(engine, 2**17, prompt_top_logprobs=64)
    assert refused.value.field == "sampling.prompt_top_logprobs"


async def test_a_request_ends_with_the_adapter_that_it_names() -> None:
    """The base model alone must not finish it. One for the policy may: its adapter is merged by then."""
    made = VllmEngine(Path("model"), VllmConfig(max_lora_rank=4), "actor-1")
    matrix = ManifestParameter("x.lora_A.weight", "F32", (4, 4), 0, 0)
    made._adapters.commit(Manifest(1, (matrix,), (), updates_vision=False, adapter="critic"))

    async def generate(*_: Any, **__: Any) -> AsyncIterator[str]:
        yield "before"
        weights = ManifestParameter("w", "F32", (4, 4), 0, 0)
        made._adapters.commit(Manifest(2, (weights,), (), updates_vision=False))
        yield "after"

    made._engine = cast("Any", SimpleNamespace(generate=generate))

    async def outputs(model: str) -> list[Any]:
        request = EngineRequest("g", TextPrompt("x"), (), SamplingParams(), model=model)
        parameters: Any = SimpleNamespace(structured_outputs=None)
        return [output async for output in made._outputs(cast("Any", {}), parameters, request)]

    assert await outputs("") == ["before", "after"]
    made._adapters.commit(Manifest(3, (matrix,), (), updates_vision=False, adapter="critic"))
    with pytest.raises(InvalidRequest, match="model: 'critic' is not here"):
        await outputs("critic")
    assert await outputs("model") == ["before", "after"]


IMAGE = EngineMedia(bytes(32), Image.new("RGB", (8, 8)))


@pytest.mark.parametrize(
    ("media", "tries", "came"),
    [
        ((IMAGE,), ["", "ab"], "ab"),  # a worker lacked the image
        ((IMAGE,), ["", ""], "!"),
        ((IMAGE,), ["a!", "ab"], "a!"),  # what has been sent cannot be taken back
        ((), ["", "ab"], "!"),
    ],
)
async def test_a_request_is_sampled_once_more_where_a_worker_lacked_its_media(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, media: tuple[EngineMedia, ...], tries: list[str], came: str
) -> None:
    """A letter is an event, "!" or no event at all is NothingSampled."""
    inputs: list[str] = []

    async def sample(_request: Any, engine_input: Any) -> AsyncIterator[str]:
        events = tries[len(inputs)]
        inputs.append(engine_input)
        for event in events.rstrip("!"):
            yield event
        if not events or events.endswith("!"):
            raise NothingSampled("nothing")

    async def understand(_request: Any, *, with_tensors: bool) -> tuple[None, str]:
        assert with_tensors
        return None, "whole"

    monkeypatch.setattr(engine, "_sample", sample)
    monkeypatch.setattr(engine, "_prompts", SimpleNamespace(understand=understand), raising=False)
    request, engine_input = EngineRequest("g", TextPrompt("x"), media, SamplingParams()), cast("Any", "short")
    seen = ""
    try:
        async for event in engine._sample_twice(request, engine_input):
            seen += cast("Any", event)
    except NothingSampled:
        seen += "!"
    assert seen == came
    assert inputs == (["short", "whole"] if media and not tries[0] else ["short"])


async def test_a_context_without_room_for_the_first_prompt_is_the_users_mistake(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(request: EngineRequest) -> AsyncIterator[Any]:
        if request.sampling.n:
            raise InvalidRequest("prompt", "24 tokens leave no room in a context of 20")
        yield

    engine._prompts = cast("Any", SimpleNamespace(placeholder_ids=(), greeting=lambda **_: TextPrompt("x")))
    monkeypatch.setattr(engine, "generate", refuse)
    with pytest.raises(
        ConfigError, match=r"^vllm\.max_model_len is too small: .*24 tokens leave no room in a context of 20$"
    ):
        await engine._warm_up()
