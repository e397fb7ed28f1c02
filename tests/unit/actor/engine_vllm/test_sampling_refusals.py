"""What vLLM objects to, by our names, and which structures it objects to."""

from types import SimpleNamespace
from typing import Any

import pytest

from actor.engine_vllm.sampling import refusal, sampling_params
from common.types import Constraint, SamplingParams, StructuredOutput


@pytest.mark.parametrize(
    ("parameter", "is_structured", "field"),
    [
        ("prompt_logprobs", False, "sampling.prompt_top_logprobs"),
        ("structured_outputs", False, "sampling.structured_output"),
        (None, True, "sampling.structured_output"),
        ("bad_words", True, "sampling.bad_words"),
        (None, False, "sampling"),
        ("truncate_prompt_tokens", True, "sampling"),
    ],
)
def test_the_field_is_named(parameter: str | None, is_structured: bool, field: str) -> None:
    error: Any = ValueError("is\n no good")
    error.parameter = parameter
    refused = refusal(error, is_structured=is_structured)
    assert (refused.field, str(refused)) == (field, f"{field}: is no good")


@pytest.mark.parametrize(
    ("structured", "is_taken"),
    [
        (StructuredOutput(Constraint.JSON_SCHEMA, '{"type": "integer"}'), True),
        (StructuredOutput(Constraint.JSON_SCHEMA, '{"allOf": [{"type": "string"}, {"enum": ["a"]}]}'), False),
        (StructuredOutput(Constraint.JSON_SCHEMA, '{"type": "integer", "multipleOf": 5}'), False),
        (StructuredOutput(Constraint.REGEX, "[a-z]+"), True),
        (StructuredOutput(Constraint.REGEX, "(?=a)[a-z]+"), False),
    ],
)
def test_one_library_makes_all_structures(structured: StructuredOutput, is_taken: bool) -> None:
    """Whether vLLM's front end takes a structure, or refuses it at once: it looks for no other library."""
    from vllm.config import StructuredOutputsConfig
    from vllm.exceptions import VLLMClientError

    from actor.engine_vllm.arguments import STRUCTURE_BACKEND

    parameters = sampling_params(SamplingParams(structured_output=structured), return_text=False)
    model: Any = SimpleNamespace(is_diffusion=False)
    tokenizer: Any = object()
    refused = None
    try:
        parameters._validate_structured_outputs(model, StructuredOutputsConfig(backend=STRUCTURE_BACKEND), tokenizer)
    except (ValueError, VLLMClientError) as error:
        refused = refusal(error, is_structured=True).field
    assert refused == (None if is_taken else "sampling.structured_output")
    assert parameters.structured_outputs._backend == "xgrammar"
