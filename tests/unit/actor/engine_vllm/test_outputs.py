"""vLLM's reports as completions, without vLLM: pieces as it hands them out."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actor.engine import EngineRequest
from actor.engine_vllm.outputs import NoProbability, NothingSampled, Sample, spans_of, top_logprobs
from common.errors import EngineDead, InvalidRequest
from common.types import (
    Constraint,
    FinishReason,
    SamplingParams,
    StructuredOutput,
    TextPrompt,
    TopLogprobs,
    VersionSpan,
)

REQUEST = EngineRequest("g", TextPrompt("x"), (), SamplingParams(), return_text=True)


def _flat(*places: list[tuple[int, float]]) -> Any:
    """At each place the sampled id and then the likeliest, as vLLM lays them out."""
    ends = [sum(map(len, places[: i + 1])) for i in range(len(places))]
    return SimpleNamespace(
        start_indices=[end - len(place) for end, place in zip(ends, places, strict=True)],
        end_indices=ends,
        token_ids=[token_id for place in places for token_id, _ in place],
        logprobs=[logprob for place in places for _, logprob in place],
    )


def _part(ids: list[int], flat: Any, reason: str | None = None, **values: Any) -> Any:
    spans = [SimpleNamespace(version="3", start=0, end=2), SimpleNamespace(version="4", start=2, end=3)]
    return SimpleNamespace(
        **{"index": 1, "token_ids": ids, "logprobs": flat, "text": "t" * len(ids), "finish_reason": reason}
        | {"weight_versions": spans, "stop_reason": None}
        | values
    )


@pytest.mark.parametrize(("narrow", "dtype"), [(np.uint8, "I16"), (np.uint16, "I32")])
def test_experts_come_in_a_signed_type_that_holds_them(narrow: Any, dtype: str) -> None:
    found = np.array([[[0, 255]], [[7, 1]]], narrow)
    last = _part([5], _flat([(5, -2.0)]), "stop", routed_experts=found)
    for asked in (True, False):
        sample = Sample(0.25)
        sample.add(last)
        completion = sample.completion(last, replace(REQUEST, return_routed_experts=asked), "name", finished_s=0.5)
        assert (completion.routed_experts is not None) is asked
        if completion.routed_experts is not None:
            assert completion.routed_experts.dtype == dtype
            assert completion.routed_experts.array().tolist() == found.tolist()
    with pytest.raises(EngineDead, match="no routed experts"):
        Sample(0.25).completion(
            _part([5], None, "stop", routed_experts=None),
            replace(REQUEST, return_routed_experts=True),
            "n",
            finished_s=1,
        )


def test_pieces_make_a_completion() -> None:
    sample = Sample(0.25, num_top=2)
    sample.add(_part([5], _flat([(5, -2.0), (6, -0.5), (5, -2.0)])))
    last = _part(
        [7, 8],
        _flat([(7, -1.0), (7, -1.0), (9, -math.inf)], [(8, 0.0), (8, 0.0), (1, -math.inf)]),
        "stop",
        stop_reason=8,
    )
    sample.add(last)
    completion = sample.completion(last, REQUEST, "name", finished_s=0.5)
    assert (completion.trajectory_id, completion.index, completion.text) == ("name", 1, "ttt")
    assert completion.token_ids.tolist() == [5, 7, 8]
    assert completion.logprobs.tolist() == [-2.0, -1.0, 0.0]
    assert completion.top_logprobs == (
        TopLogprobs((6, 5), (-0.5, -2.0)),
        TopLogprobs((7,), (-1.0,)),
        TopLogprobs((8,), (0.0,)),
    )
    assert completion.version_spans == (VersionSpan(3, 0, 2), VersionSpan(4, 2, 3))
    assert (completion.finish_reason, completion.stop) == (FinishReason.STOP, 8)
    assert (completion.first_token_s, completion.finished_s) == (0.25, 0.5)


def test_what_ended_for_another_reason_has_no_stop() -> None:
    sample = Sample(0.0)
    last = _part([5], _flat([(5, -2.0)]), "repetition", stop_reason="repetition_detected")
    sample.add(last)
    completion = sample.completion(last, REQUEST, "name", finished_s=0.5)
    assert (completion.finish_reason, completion.stop, completion.top_logprobs) == (FinishReason.REPETITION, None, ())


def test_what_is_no_sample() -> None:
    with pytest.raises(NothingSampled):
        Sample(0.0).completion(_part([], None, "error"), REQUEST, "name", finished_s=1)
    for reason in ("error", "abort", None):
        sample = Sample(0.0)
        sample.add(_part([5], _flat([(5, -2.0)])))
        with pytest.raises(EngineDead, match=f"broke a completion off \\({reason}\\)"):
            sample.completion(_part([], None, reason), REQUEST, "name", finished_s=1)


def test_a_structure_that_was_given_up_is_the_callers() -> None:
    sample = Sample(0.0)
    sample.add(_part([5], _flat([(5, -2.0)])))
    asked = replace(REQUEST, sampling=SamplingParams(structured_output=StructuredOutput(Constraint.REGEX, "((a*)*)*")))
    with pytest.raises(InvalidRequest) as raised:
        sample.completion(_part([], None, "error"), asked, "name", finished_s=1)
    assert raised.value.field == "sampling.structured_output"


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
@pytest.mark.parametrize(
    ("sampling", "leaves_nothing"),
    [
        ({}, False),
        ({"temperature": 0.5, "top_k": 1, "top_p": 1e-6, "min_p": 1.0, "repetition_penalty": 1e3}, False),
        ({"logit_bias": ((5, -100.0),), "stop_token_ids": (5,), "stop": ("x",)}, False),
        # Each leaves something as it was checked: one id of those, all but some words, all but the end.
        ({"allowed_token_ids": (5, 6), "bad_token_ids": (5,)}, False),
        ({"bad_words": ("x",)}, False),
        ({"min_tokens": 3}, False),
        ({"allowed_token_ids": (5,), "min_tokens": 3}, True),
        ({"allowed_token_ids": (5,), "bad_words": ("x",)}, True),
        ({"bad_token_ids": (5,), "min_tokens": 3}, True),
        ({"min_tokens": 3, "stop_token_ids": (5,)}, True),
        ({"structured_output": StructuredOutput(Constraint.REGEX, "a")}, True),
    ],
)
def test_no_probability_is_the_fault_of_the_constraints_only_if_they_can_leave_none(
    sampling: dict[str, Any], leaves_nothing: bool, logprob: float
) -> None:
    """A learner drops a group that is at fault, and asks another actor where the engine is."""
    sample = Sample(0.0)
    last = _part([5], _flat([(5, logprob)]), "length")
    sample.add(last)
    asked = replace(REQUEST, sampling=SamplingParams(**sampling))
    with pytest.raises(InvalidRequest if leaves_nothing else EngineDead) as raised:
        sample.completion(last, asked, "name", finished_s=1)
    problem = "its constraints together leave no token" if leaves_nothing else "the model gave no finite probability"
    assert problem in raised.value.message


def test_what_came_before_it_is_said_of_a_place_without_probability() -> None:
    """Also where a grammar has rejected what was drawn there: that is no grammar which takes too long."""
    asked = replace(REQUEST, sampling=SamplingParams(structured_output=StructuredOutput(Constraint.REGEX, "a")))
    for reason in ("length", "error"):
        sample = Sample(0.0)
        last = _part([5, 6, 0], _flat([(5, -2.0)], [(6, -1.0)], [(0, math.nan)]), reason)
        sample.add(last)
        with pytest.raises(NoProbability) as raised:
            sample.completion(last, asked, "name", finished_s=1)
        assert (raised.value.token_ids, raised.value.field) == ((5, 6), "sampling")


@pytest.mark.parametrize("logprob", [math.nan, math.inf])
def test_an_alternative_without_probability_is_the_models_fault(logprob: float) -> None:
    with pytest.raises(EngineDead, match="the model gave no finite probability"):
        top_logprobs(_flat([(5, -2.0), (5, -2.0), (6, logprob)]), 0)


def test_places_and_spans() -> None:
    flat = _flat([(5, -2.0)], [(5, -2.0), (6, -0.5)])
    assert [top_logprobs(flat, place).token_ids for place in (0, 1)] == [(), (6,)]
    assert spans_of((3, 3, 4, 3)) == (VersionSpan(3, 0, 2), VersionSpan(4, 2, 3), VersionSpan(3, 3, 4))
    assert spans_of(()) == ()
