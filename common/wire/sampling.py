"""`SamplingParams`: how completions are sampled or searched for."""

from typing import Any

from common.errors import InvalidRequest
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.types import Constraint, RepetitionDetection, SamplingParams, StructuredOutput
from common.wire.bounds import check_count

# Fields by kind; the names are the same on both sides.
_PLAIN = (
    "n",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "top_logprobs",
    "prompt_logprobs",
    "prompt_top_logprobs",
    "num_beams",
    "include_stop_str_in_output",
    "skip_special_tokens",
)
_OPTIONAL = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "length_penalty",
)
_REPEATED = ("stop_token_ids", "stop", "allowed_token_ids", "bad_token_ids", "bad_words")

# Vocabularies are smaller; what a server takes is less, and checked in `actor.validation.request`.
_MAX_ITEMS = 2**20
# Each costs a place in a sorted tuple before a server can look at it.
_MAX_BIASES = 1024


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """`SamplingParams` as a message; what is None stays unset."""
    values = {name: getattr(params, name) for name in (*_PLAIN, *_OPTIONAL, *_REPEATED)}
    message = pb.SamplingParams(**{name: value for name, value in values.items() if value is not None})
    message.logit_bias.update(params.logit_bias)
    if params.structured_output is not None:
        message.structured_output.CopyFrom(_structured_to_proto(params.structured_output))
    if (detection := params.repetition_detection) is not None:
        message.repetition_detection.CopyFrom(
            pb.RepetitionDetection(
                max_pattern_size=detection.max_pattern_size,
                min_pattern_size=detection.min_pattern_size,
                min_count=detection.min_count,
            )
        )
    return message


def sampling_from_proto(message: pb.SamplingParams, field: str) -> SamplingParams:
    """Raises InvalidRequest for a constraint that is none; ranges are the business of `actor.validation.request`."""
    for name in _REPEATED:
        check_count(getattr(message, name), f"{field}.{name}", _MAX_ITEMS)
    check_count(message.logit_bias, f"{field}.logit_bias", _MAX_BIASES)
    values: dict[str, Any] = {name: getattr(message, name) for name in _PLAIN}
    values |= {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}  # type: ignore[arg-type]
    values |= {name: tuple(getattr(message, name)) for name in _REPEATED}
    values["n"] = values["n"] or 1
    values["logit_bias"] = tuple(sorted(message.logit_bias.items()))
    if message.HasField("structured_output"):
        values["structured_output"] = _structured_from_proto(message.structured_output, f"{field}.structured_output")
    if message.HasField("repetition_detection"):
        detection = message.repetition_detection
        values["repetition_detection"] = RepetitionDetection(
            detection.max_pattern_size, detection.min_pattern_size or 1, detection.min_count
        )
    return SamplingParams(**values)


def _structured_to_proto(structured: StructuredOutput) -> pb.StructuredOutput:
    match structured.constraint:
        case Constraint.CHOICE:
            return pb.StructuredOutput(choice=pb.Choice(texts=structured.choices))
        case Constraint.JSON_OBJECT:
            return pb.StructuredOutput(json_object=True)
        case constraint:
            return pb.StructuredOutput(**{constraint.value: structured.spec})  # type: ignore[arg-type]


def _structured_from_proto(message: pb.StructuredOutput, field: str) -> StructuredOutput:
    match message.WhichOneof("constraint"):
        case "choice":
            check_count(message.choice.texts, f"{field}.choice.texts", _MAX_ITEMS)
            return StructuredOutput(Constraint.CHOICE, choices=tuple(message.choice.texts))
        case "json_object":
            if not message.json_object:
                raise InvalidRequest(f"{field}.json_object", "is false; leave structured_output unset")
            return StructuredOutput(Constraint.JSON_OBJECT)
        case None:
            raise InvalidRequest(field, "is empty; set one of regex, json_schema, choice, grammar or json_object")
        case name:
            return StructuredOutput(Constraint(name), getattr(message, name))
