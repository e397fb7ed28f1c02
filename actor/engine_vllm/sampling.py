"""Our sampling parameters as vLLM's, and what vLLM objects to as an error that names our field."""

from typing import TYPE_CHECKING

from common.errors import InvalidRequest
from common.types import Constraint, SamplingParams, StructuredOutput

if TYPE_CHECKING:
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import StructuredOutputsParams

# vLLM's names of parameters that have another one here.
_FIELDS = {
    "logprobs": "top_logprobs",
    "prompt_logprobs": "prompt_top_logprobs",
    "structured_outputs": "structured_output",
}


def sampling_params(wanted: SamplingParams, *, return_text: bool) -> "VllmSamplingParams":
    """How to sample one group. Raises what vLLM raises."""
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

    detection = wanted.repetition_detection
    return SamplingParams(
        n=wanted.n,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        max_tokens=wanted.max_tokens or None,
        min_tokens=wanted.min_tokens,
        seed=wanted.seed,
        stop=list(wanted.stop),
        stop_token_ids=list(wanted.stop_token_ids),
        include_stop_str_in_output=wanted.include_stop_str_in_output,
        ignore_eos=wanted.ignore_eos,
        allowed_token_ids=list(wanted.allowed_token_ids) or None,
        logit_bias=_logit_bias(wanted),
        bad_words=list(wanted.bad_words),
        repetition_penalty=wanted.repetition_penalty,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        structured_outputs=_structured_outputs(wanted.structured_output),
        repetition_detection=detection
        and RepetitionDetectionParams(detection.max_pattern_size, detection.min_pattern_size, detection.min_count),
        logprobs=wanted.top_logprobs,
        flat_logprobs=True,
        detokenize=return_text or bool(wanted.stop),
        skip_special_tokens=wanted.skip_special_tokens,
        output_kind=RequestOutputKind.DELTA,
    )


def scoring_params(num_top: int) -> "VllmSamplingParams":
    """For the logprobs of a prompt and its `num_top` most likely ids at each place; the one token sampled is waste."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=num_top, flat_logprobs=True, detokenize=False)


def probing_params() -> "VllmSamplingParams":
    """For the model's own most likely next token, without any constraint of a request."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, flat_logprobs=True, detokenize=False)


def extending_params(wanted: SamplingParams) -> "VllmSamplingParams":
    """For one step of one beam: its most likely next tokens. Greedy, so that logprobs are under temperature 1."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        allowed_token_ids=list(wanted.allowed_token_ids) or None,
        logit_bias=_logit_bias(wanted),
        logprobs=2 * wanted.num_beams,
        flat_logprobs=True,
        detokenize=False,
    )


def refusal(error: Exception, *, is_structured: bool = False) -> InvalidRequest:
    """vLLM's objection to a parameter. Of a structure that it cannot make it says no name."""
    name = getattr(error, "parameter", None)
    name = _FIELDS.get(name, name) if isinstance(name, str) else None
    if name is None and is_structured:
        name = "structured_output"
    field = f"sampling.{name}" if name in SamplingParams.__slots__ else "sampling"
    return InvalidRequest(field, " ".join(str(error).split()))


def _logit_bias(wanted: SamplingParams) -> dict[int, float] | None:
    biases = {**dict(wanted.logit_bias), **dict.fromkeys(wanted.bad_token_ids, float("-inf"))}
    return biases or None


def _structured_outputs(wanted: StructuredOutput | None) -> "StructuredOutputsParams | None":
    from vllm.sampling_params import StructuredOutputsParams

    if wanted is None:
        return None
    if wanted.constraint is Constraint.CHOICE:
        return StructuredOutputsParams(choice=list(wanted.choices))
    if wanted.constraint is Constraint.JSON_OBJECT:
        return StructuredOutputsParams(json_object=True)
    name = "json" if wanted.constraint is Constraint.JSON_SCHEMA else wanted.constraint.value
    return StructuredOutputsParams(**{name: wanted.spec})
