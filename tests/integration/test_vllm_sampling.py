"""Every sampling parameter on the real engine, against transformers' logits and the definition written out in numpy."""

import copy
import io
import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.sampling_params import BeamSearchParams

from actor.engine import EngineMedia
from common.errors import EngineDead, InvalidRequest
from common.tensors import NamedTensor, tensor_of, tensors_hash
from common.types import (
    ChatPrompt,
    Completion,
    Constraint,
    FinishReason,
    RepetitionDetection,
    SamplingParams,
    StructuredOutput,
    TextPrompt,
    TokenPrompt,
)
from learner.types import Group
from tests.helpers.groups import SUPPRESSED, image_bytes, reference_logits, sample
from tests.integration.live_actor import LiveActor, WeightSource, media_of

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

IM_END = 258
# The byte-level tokenizer counts printable ASCII from "!".
A, B, C = (ord(letter) - ord("!") for letter in "ABC")
PARITY = 1e-4
WITH_IMAGE = sample(0, "what is this?", [image_bytes(1)])
TEXT_ONLY = sample(1, "no image here, only words")
Row = npt.NDArray[np.float64]


# ------------------------------------------------------------------------------------------------- the distribution


def sampled_from(logits: Row, params: SamplingParams, prompt_ids: list[int], output_ids: list[int]) -> Row:
    """log-probabilities that a token is sampled from, by the definition of each parameter."""
    x = logits.astype(np.float64).copy()
    vocabulary = np.arange(len(x))
    if params.allowed_token_ids:
        x[~np.isin(vocabulary, params.allowed_token_ids)] = -np.inf
    x[[*SUPPRESSED, *params.bad_token_ids]] = -np.inf
    for token_id, bias in params.logit_bias:
        x[token_id] += bias
    if len(output_ids) < params.min_tokens:
        x[[IM_END, *params.stop_token_ids]] = -np.inf
    seen = np.isin(vocabulary, [*prompt_ids, *output_ids])
    counts = np.bincount(output_ids, minlength=len(x)) if output_ids else np.zeros(len(x))
    penalty = params.repetition_penalty
    x = np.where(seen, np.where(x > 0, x / penalty, x * penalty), x)
    x -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    x /= params.temperature or 1.0
    if params.min_p:
        x[np.exp(x) < params.min_p * np.exp(x.max())] = -np.inf
    if params.top_k:
        x[x < np.sort(x)[-params.top_k]] = -np.inf
    if params.top_p < 1:
        order = np.argsort(-x)
        p = np.exp(x[order] - np.logaddexp.reduce(x))
        x[order[np.cumsum(p) - p >= params.top_p]] = -np.inf
    result: Row = x - np.logaddexp.reduce(x)
    return result


PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "top-p": {"top_p": 0.6},
    "top-k": {"top_k": 5},
    "min-p": {"min_p": 0.2},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7},
    "bias": {"logit_bias": ((65, 8.0), (66, -3.0))},
    "bad ids": {"bad_token_ids": tuple(range(0, 320, 2))},
    "allowed ids": {"allowed_token_ids": (65, 66, 67, 68, IM_END)},
    "min tokens": {"min_tokens": 4, "logit_bias": ((IM_END, 12.0),)},
    "min tokens, stop id": {"min_tokens": 4, "stop_token_ids": (66,), "logit_bias": ((66, 12.0),)},
    "greedy": {"temperature": 0.0, "repetition_penalty": 1.3},
    "all": {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": ((65, 2.0),),
        "bad_token_ids": (66,),
    },
}


@pytest.mark.parametrize("name", PARAMETERS)
async def test_logprobs_are_of_what_was_sampled_from(actor: LiveActor, model: Any, hf: Any, name: str) -> None:
    """The sampled token's logprob and the most likely alternatives, at each place of each completion."""
    params = SamplingParams(**{"n": 1, "max_tokens": 12, "seed": 5, "top_logprobs": 6} | PARAMETERS[name])
    params_of = {field: getattr(params, field) for field in SamplingParams.__slots__}
    for prompt in (WITH_IMAGE, TEXT_ONLY):
        group = await actor.group(prompt, **params_of)
        prompt_ids = group.prompt.expanded_ids.tolist()
        for completion in group.completions:
            ids = completion.token_ids.tolist()
            with torch.no_grad():
                logits = reference_logits(model, hf, group, completion).double().numpy()
            for t, token_id in enumerate(ids):
                expected = sampled_from(logits[t], params, prompt_ids, ids[:t])
                assert completion.logprobs[t] == pytest.approx(expected[token_id], abs=PARITY), (t, token_id)
                top = completion.top_logprobs[t]
                possible = min(6, int(np.isfinite(expected).sum()))
                assert len(top.token_ids) == possible
                np.testing.assert_allclose(top.logprobs, np.sort(expected)[::-1][:possible], atol=PARITY)
                np.testing.assert_allclose(expected[list(top.token_ids)], top.logprobs, atol=PARITY)


# A, B and C in turns.
LETTERS: dict[str, Any] = {"allowed_token_ids": (A, B, C), "temperature": 2.0, "frequency_penalty": 2.0}


async def test_bounds_hold(actor: LiveActor) -> None:
    """Whatever is likely: ids that may not, words that may not, and no end before its time."""
    ending = ((IM_END, 100.0),)
    [short] = (await _ask(actor, max_tokens=20, logit_bias=ending)).completions
    assert short.token_ids.tolist() == [IM_END]
    [longer] = (await _ask(actor, max_tokens=20, logit_bias=ending, min_tokens=5)).completions
    assert len(longer.token_ids) == 6
    assert longer.token_ids.tolist().index(IM_END) == 5
    spelled = {"n": 8, "max_tokens": 20, "seed": 1, **LETTERS}
    free = (await _ask(actor, **spelled)).completions
    assert any("AB" in completion.text for completion in free)
    bound = (await _ask(actor, **spelled, bad_words=("AB",))).completions
    assert not any("AB" in completion.text for completion in bound)
    assert all("A" in completion.text for completion in bound)


async def test_stops(actor: LiveActor) -> None:
    spelled = {"n": 8, "max_tokens": 40, "seed": 3, **LETTERS}
    free = (await _ask(actor, **spelled)).completions
    by_id = (await _ask(actor, **spelled, stop_token_ids=(C,))).completions
    by_string = (await _ask(actor, **spelled, stop=("BC", "CAB"))).completions
    shown = (await _ask(actor, **spelled, stop=("BC", "CAB"), include_stop_str_in_output=True)).completions
    ends = set()
    for before, id_stop, string_stop, text in zip(free, by_id, by_string, shown, strict=True):
        ids = before.token_ids.tolist()
        end = ids.index(C) + 1
        assert id_stop.token_ids.tolist() == ids[:end]
        assert (id_stop.finish_reason, id_stop.stop) == (FinishReason.STOP, C)
        found = re.search("BC|CAB", before.text)
        assert found is not None
        assert string_stop.token_ids.tolist() == ids[: found.end()]
        assert (string_stop.text, string_stop.stop) == (before.text[: found.start()], found.group())
        assert text.text == before.text[: found.end()]
        assert len(string_stop.logprobs) == found.end() == string_stop.version_spans[-1].end
        ends.add(found.group())
        assert before.stop is None
    assert ends == {"BC", "CAB"}
    # With min_tokens it is the first that ends behind them: a letter is a token.
    late = (await _ask(actor, **spelled, stop=("BC", "CAB"), min_tokens=12)).completions
    for before, completion in zip(free, late, strict=True):
        end = next(end for end in range(13, 41) if before.text[:end].endswith(("BC", "CAB")))
        assert completion.token_ids.tolist() == before.token_ids.tolist()[:end]
        assert completion.stop in {"BC", "CAB"}
        assert completion.text + completion.stop == before.text[:end]
    assert any(re.search("BC|CAB", before.text[:12]) for before in free)


async def test_special_tokens_in_the_text(actor: LiveActor) -> None:
    shown = await _ask(actor, max_tokens=2, logit_bias=((257, 100.0),))
    hidden = await _ask(actor, max_tokens=2, logit_bias=((257, 100.0),), skip_special_tokens=True)
    assert shown.completions[0].text == "<|im_start|><|im_start|>"
    assert hidden.completions[0].text == ""


async def test_repetition_ends_a_completion(actor: LiveActor) -> None:
    detection = RepetitionDetection(max_pattern_size=2, min_pattern_size=1, min_count=4)
    [completion] = (
        await _ask(actor, max_tokens=40, logit_bias=((A, 100.0),), repetition_detection=detection)
    ).completions
    assert completion.text == "AAAA"
    assert completion.finish_reason is FinishReason.REPETITION


async def test_completion_i_samples_from_seed_plus_i(actor: LiveActor) -> None:
    group = (await _ask(actor, n=3, max_tokens=20, seed=11)).completions
    for i, completion in enumerate(group):
        [alone] = (await _ask(actor, max_tokens=20, seed=11 + i)).completions
        assert alone.token_ids.tolist() == completion.token_ids.tolist()
    assert len({completion.token_ids.tobytes() for completion in group}) == 3


async def test_constraints_that_leave_nothing(actor: LiveActor) -> None:
    with pytest.raises(InvalidRequest, match="leave no token to sample"):
        await _ask(actor, max_tokens=4, allowed_token_ids=(IM_END,), min_tokens=3)
    assert len((await _ask(actor, n=2, max_tokens=4)).completions) == 2
    with pytest.raises(InvalidRequest) as refused:
        await _ask(actor, temperature=3.0)
    assert refused.value.field == "sampling.temperature"


async def test_a_prompt_that_fills_the_context(actor: LiveActor) -> None:
    full = TokenPrompt((A,) * actor.info.max_context_tokens)
    for sampling in ({}, {"num_beams": 2}, {"prompt_logprobs": True}):
        with pytest.raises(InvalidRequest, match="leave no room") as refused:
            await actor.ask(full, max_tokens=4, **sampling)
        assert refused.value.field == "prompt"
    almost = TokenPrompt(full.ids[1:])
    assert len((await actor.ask(almost, num_beams=2, max_tokens=4)).completions[0].token_ids) == 1
    with pytest.raises(InvalidRequest, match="there are only 2 beams"):
        await actor.ask(almost, n=4, num_beams=4, max_tokens=4, allowed_token_ids=(A, B))


# --------------------------------------------------------------------------------------------------------- the prompt


@pytest.mark.parametrize("prompt", [WITH_IMAGE, TEXT_ONLY], ids=["image", "text"])
async def test_prompt_logprobs_are_those_of_transformers(actor: LiveActor, model: Any, hf: Any, prompt: Any) -> None:
    chat, media = ChatPrompt(prompt.messages), media_of(prompt.images)
    await actor.ask(chat, media, max_tokens=1)  # fills the prefix cache, which must not shorten the answer
    info = (await actor.ask(chat, media, max_tokens=1, prompt_logprobs=True, prompt_top_logprobs=4)).prompt
    group = await actor.group(prompt, max_tokens=1)
    prompt_group = Group("g", 0, prompt, group.processed, info, (), np.empty(0, np.float32))
    with torch.no_grad():
        expected = torch.log_softmax(_prompt_logits(model, hf, prompt_group).double(), -1).numpy()
    ids = info.expanded_ids.tolist()
    assert info.prompt_logprobs[0] == 0
    assert len(info.prompt_logprobs) == len(info.prompt_top_logprobs) == len(ids)
    np.testing.assert_allclose(
        info.prompt_logprobs[1:], expected[np.arange(len(ids) - 1), ids[1:]], atol=PARITY, rtol=1e-5
    )
    assert info.prompt_top_logprobs[0].token_ids == ()
    for row, top in zip(expected, info.prompt_top_logprobs[1:], strict=False):
        np.testing.assert_allclose(top.logprobs, np.sort(row)[::-1][:4], atol=PARITY)
        np.testing.assert_allclose(row[list(top.token_ids)], top.logprobs, atol=PARITY)
    only = (await actor.ask(chat, media, max_tokens=1, prompt_logprobs=True)).prompt
    assert only.prompt_top_logprobs == ()
    np.testing.assert_allclose(only.prompt_logprobs, info.prompt_logprobs, atol=1e-5)


def _prompt_logits(model: Any, hf: Any, group: Group) -> torch.Tensor:
    """Row t predicts id t + 1: the prompt's ids but the first count as a completion of it."""
    ids = group.prompt.expanded_ids
    one = Completion("", 0, np.zeros(1, np.int32), np.zeros(1, np.float32), FinishReason.STOP, ())
    inputs: dict[str, Any] = {}

    def capture(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        inputs["logits"] = output.logits[0]

    handle = model.register_forward_hook(capture, with_kwargs=True)
    try:
        reference_logits(model, hf, group, one)
    finally:
        handle.remove()
    result: torch.Tensor = inputs["logits"][: len(ids) - 1]
    return result


# ----------------------------------------------------------------------------------------------------- the structure

SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer"}, "sure": {"type": "boolean"}},
    "required": ["digit", "sure"],
    "additionalProperties": False,
}
# Letters and quotes for the JSON: a random model writes none of them by itself, and spaces without end.
CLOSING = tuple((ord(c) - ord("!"), 12.0) for c in '}",:')


async def test_structured_outputs(actor: LiveActor) -> None:
    texts = await _texts(actor, StructuredOutput(Constraint.REGEX, r"(ab|c){2,4}-[0-9]{3}"))
    assert all(re.fullmatch(r"(ab|c){2,4}-[0-9]{3}", text) for text in texts)
    assert len(set(texts)) > 1
    texts = await _texts(actor, StructuredOutput(Constraint.CHOICE, choices=("red", "green", "blue")))
    assert set(texts) <= {"red", "green", "blue"}
    texts = await _texts(actor, StructuredOutput(Constraint.GRAMMAR, 'root ::= "x" digit "y"\ndigit ::= [0-9]'))
    assert all(re.fullmatch("x[0-9]y", text) for text in texts)
    for text in await _texts(actor, StructuredOutput(Constraint.JSON_SCHEMA, json.dumps(SCHEMA)), logit_bias=CLOSING):
        value = json.loads(text)
        assert sorted(value) == ["digit", "sure"]
        assert isinstance(value["digit"], int)
        assert isinstance(value["sure"], bool)
    for text in await _texts(
        actor, StructuredOutput(Constraint.JSON_OBJECT), logit_bias=((ord("}") - ord("!"), 100.0),)
    ):
        assert isinstance(json.loads(text), dict)


async def test_structured_logprobs_are_of_what_is_left(actor: LiveActor, model: Any, hf: Any) -> None:
    structured = StructuredOutput(Constraint.CHOICE, choices=("A", "B"))
    group = await actor.group(WITH_IMAGE, n=8, max_tokens=8, seed=2, structured_output=structured, top_logprobs=3)
    for completion in group.completions:
        with torch.no_grad():
            logits = reference_logits(model, hf, group, completion).double()
        letters = torch.log_softmax(logits[0, [A, B]], 0).tolist()
        assert completion.logprobs[0] == pytest.approx(letters[int(completion.token_ids[0]) - A], abs=PARITY)
        assert sorted(completion.top_logprobs[0].token_ids) == [A, B]
        # Nothing may follow but the end.
        assert completion.token_ids.tolist()[1:] == [IM_END]
        assert completion.logprobs[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput(Constraint.REGEX, "(unclosed"),
        StructuredOutput(Constraint.JSON_SCHEMA, "{"),
        StructuredOutput(Constraint.JSON_SCHEMA, '{"type": "nonsense"}'),
        StructuredOutput(Constraint.GRAMMAR, "root ::= missing"),
        # What xgrammar cannot do, and other libraries can: an engine has one.
        StructuredOutput(Constraint.REGEX, "(?=a)[a-z]+"),
        StructuredOutput(Constraint.JSON_SCHEMA, '{"allOf": [{"type": "string"}, {"enum": ["yes", "no"]}]}'),
        StructuredOutput(Constraint.JSON_SCHEMA, '{"type": "integer", "multipleOf": 5}'),
    ],
    ids=["regex", "json", "schema", "grammar", "look-ahead", "all of", "multiples"],
)
async def test_a_structure_that_is_none(actor: LiveActor, structured: StructuredOutput) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await _ask(actor, max_tokens=8, structured_output=structured)
    assert refused.value.field == "sampling.structured_output"
    assert len((await _ask(actor, max_tokens=2)).completions) == 1


async def test_a_grammar_that_holds_up_everybody_is_given_up(actor: LiveActor) -> None:
    """Each token of it would take longer than the one before, on the thread that all requests share."""
    with pytest.raises(InvalidRequest) as refused:
        await _ask(
            actor, max_tokens=400, min_tokens=400, structured_output=StructuredOutput(Constraint.REGEX, "((a*)*)*")
        )
    assert str(refused.value) == "sampling.structured_output: takes too long to match; write it less ambiguously"
    assert len((await _ask(actor, max_tokens=2)).completions) == 1


async def _texts(actor: LiveActor, structured: StructuredOutput, **sampling: Any) -> list[str]:
    group = await _ask(actor, n=4, max_tokens=400, seed=4, structured_output=structured, **sampling)
    assert {completion.finish_reason for completion in group.completions} == {FinishReason.STOP}
    return [completion.text for completion in group.completions]


# ---------------------------------------------------------------------------------------------------------- the beams


@pytest.mark.parametrize("prompt", [WITH_IMAGE, TEXT_ONLY], ids=["image", "text"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -30.0])
async def test_beams_are_those_of_a_search_by_hand(
    actor: LiveActor, model: Any, hf: Any, prompt: Any, length_penalty: float
) -> None:
    """Against a search written out over transformers' logits; ends of sequences are made likely."""
    bias = ((IM_END, 4.0),)
    group = await actor.group(prompt, n=3, num_beams=4, max_tokens=6, length_penalty=length_penalty, logit_bias=bias)
    prompt_ids = group.prompt.expanded_ids.tolist()
    expected = _search(model, hf, group, num_beams=4, max_tokens=6, length_penalty=length_penalty, bias=bias)
    assert len(group.completions) == 3
    for i, (completion, (score, ids, logprobs)) in enumerate(zip(group.completions, expected[:3], strict=True)):
        assert completion.index == i
        assert completion.token_ids.tolist() == ids
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=PARITY)
        assert completion.beam is not None
        assert completion.beam.cumulative_logprob == pytest.approx(sum(logprobs), abs=1e-3)
        assert completion.beam.score == pytest.approx(score, rel=1e-3)
        is_ended = ids[-1] == IM_END
        assert completion.finish_reason is (FinishReason.STOP if is_ended else FinishReason.LENGTH)
        assert completion.version_spans[-1].end == len(ids)
    assert len(prompt_ids) > 10


def _search(
    model: Any, hf: Any, group: Group, *, num_beams: int, max_tokens: int, length_penalty: float, bias: Any
) -> list[tuple[float, list[int], list[float]]]:
    """Score, ids and logprobs of the best beams; to the end, whatever happens."""
    num_prompt = len(group.prompt.expanded_ids)

    def score(ids: list[int], logprobs: list[float]) -> float:
        return sum(logprobs) / float((num_prompt + len(ids) - (ids[-1] == IM_END)) ** length_penalty)

    live: list[tuple[list[int], list[float]]] = [([], [])]
    ended: list[tuple[list[int], list[float]]] = []
    for _ in range(max_tokens):
        longer: list[tuple[list[int], list[float]]] = []
        for ids, logprobs in live:
            one_more = Completion("", 0, np.array([*ids, 0], np.int32), np.zeros(1), FinishReason.STOP, ())
            with torch.no_grad():
                logits = reference_logits(model, hf, group, one_more)[-1].double()
            logits[list(SUPPRESSED)] = -torch.inf
            for token_id, value in bias:
                logits[token_id] += value
            row = torch.log_softmax(logits, 0)
            for token_id in row.topk(2 * num_beams).indices.tolist():
                extended = ([*ids, token_id], [*logprobs, float(row[token_id])])
                (ended if token_id == IM_END else longer).append(extended)
        live = sorted(longer, key=lambda beam: sum(beam[1]), reverse=True)[:num_beams]
    found = [(score(*beam), *beam) for beam in [*ended, *live]]
    return sorted(found, key=lambda beam: beam[0], reverse=True)[:num_beams]


async def test_the_tensors_of_an_image_cross_once_in_a_search(
    actor: LiveActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the engine process; and again for those beams of a step that find them lost."""
    core: Any = actor.vllm._require().engine_core
    send = core.add_request_async

    async def search(loses_at: int) -> tuple[list[bool], list[list[int]]]:
        """For each request whether it had tensors, and the beams. The request of that number finds them lost."""
        crossed: list[bool] = []

        async def counted(request: Any) -> None:
            crossed.append(any(feature.data is not None for feature in request.mm_features))
            if len(crossed) == loses_at:
                await core.reset_mm_cache_async()
            await send(request)

        monkeypatch.setattr(core, "add_request_async", counted)
        group = await actor.group(WITH_IMAGE, n=4, num_beams=4, max_tokens=6, ignore_eos=True)
        return crossed, [completion.token_ids.tolist() for completion in group.completions]

    crossed, beams = await search(loses_at=0)
    assert crossed == [True] + [False] * 5 * 4
    crossed, same_beams = await search(loses_at=10)
    num_lost = len(crossed) - (1 + 5 * 4)
    assert 1 <= num_lost <= 4
    assert sum(crossed) == 1 + num_lost
    assert same_beams == beams


async def test_beams_are_those_of_vllms_own_search(actor: LiveActor) -> None:
    class Own(BeamSearchOnlineMixin):
        engine_client = actor.vllm._engine
        renderer = actor.vllm._engine.renderer

    async def search(prompt_ids: list[int], num_beams: int) -> Any:
        [prompt] = await Own.renderer.render_cmpl_async([{"prompt_token_ids": prompt_ids}])
        parameters = BeamSearchParams(num_beams, 12, include_stop_str_in_output=True)
        [output] = [output async for output in Own().beam_search(prompt, "own", parameters)]
        return output

    for prompt, num_beams in (("Which digit is this?", 3), ("words", 5)):
        group = await actor.ask(TextPrompt(prompt), n=num_beams, num_beams=num_beams, max_tokens=12)
        output = await actor.engine._there(search(group.prompt.expanded_ids.tolist(), num_beams))
        assert [completion.token_ids.tolist() for completion in group.completions] == [
            list(beam.token_ids) for beam in output.outputs
        ]
        np.testing.assert_allclose(
            [completion.beam.cumulative_logprob for completion in group.completions],
            [beam.cumulative_logprob for beam in output.outputs],
            atol=PARITY,
        )


async def _ask(actor: LiveActor, **sampling: Any) -> Any:
    return await actor.ask(TextPrompt("say it"), **sampling)


# ------------------------------------------------------------------------------------------- what the model is given


async def test_processed_tensors_of_a_model_that_normalizes_itself(actor: LiveActor, hf: Any) -> None:
    """They are the processor's without rescaling and normalizing; normalized ones are refused, not normalized twice."""
    chat, media = ChatPrompt(WITH_IMAGE.messages), media_of(WITH_IMAGE.images)
    answer = {"temperature": 0.0, "max_tokens": 8}
    expected = await actor.ask(chat, media, **answer, return_processed=True)
    tensors = expected.prompt.media[0].processed
    image = Image.open(io.BytesIO(WITH_IMAGE.images[0])).convert("RGB")
    raw = hf.image_processor(image, return_tensors="np", do_rescale=False, do_normalize=False)
    assert [named.name for named in tensors] == ["image_grid_thw", "pixel_values"]
    assert tensors[1].tensor.dtype == "U8"
    np.testing.assert_array_equal(tensors[1].tensor.array(), raw["pixel_values"])
    found = await actor.ask(chat, (EngineMedia(tensors_hash(tensors), tensors),), **answer)
    assert found.completions[0].token_ids.tolist() == expected.completions[0].token_ids.tolist()
    np.testing.assert_allclose(found.completions[0].logprobs, expected.completions[0].logprobs, atol=PARITY)
    normalized = NamedTensor("pixel_values", tensor_of(hf.image_processor(image, return_tensors="np")["pixel_values"]))
    with pytest.raises(InvalidRequest, match="normalize_on_device") as refused:
        await actor.ask(chat, (EngineMedia(bytes(32), (tensors[0], normalized)),), **answer)
    assert refused.value.field == "media[0].processed.tensors[1].tensor.dtype"


# ---------------------------------------------------------------------------------------------- a model that diverged

ANSWERS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"top_logprobs": 4},
    {"num_beams": 2},
    {"prompt_logprobs": True},
    {"prompt_top_logprobs": 4},
    {"structured_output": StructuredOutput(Constraint.REGEX, "(ab|c){2,4}")},
    {"structured_output": StructuredOutput(Constraint.CHOICE, choices=("red", "green"))},
    {"allowed_token_ids": (A, B), "min_tokens": 2},
)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
async def test_a_diverged_model_gives_no_rollout(
    actor: LiveActor, model: Any, source: WeightSource, value: float
) -> None:
    """Of no kind: each is answered as by an engine that has died, and never as if the request were at fault."""
    diverged = copy.deepcopy(model)
    with torch.no_grad():
        diverged.get_submodule("model.language_model.norm").weight[0] = value
    for prompt, media in ((TextPrompt("say it"), ()), (ChatPrompt(WITH_IMAGE.messages), media_of(WITH_IMAGE.images))):
        await source.publish(diverged)
        for sampling in ANSWERS:
            with pytest.raises(EngineDead, match="the model gave no finite probability"):
                await actor.ask(prompt, media, max_tokens=8, **sampling)
        await source.publish(model)
        for sampling in ANSWERS:
            assert (await actor.ask(prompt, media, max_tokens=8, **sampling)).completions
