"""What `Generate` streams: `PromptInfo` first, then `Completion`s."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.errors import InvalidRequest, MalformedResponse
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.tensors import Tensor
from common.types import (
    BeamScore,
    Completion,
    FinishReason,
    IntArray,
    MediaUse,
    PlaceholderRange,
    PromptInfo,
    TopLogprobs,
    VersionSpan,
)
from common.wire.media import MODALITY, MODALITY_BACK
from common.wire.tensors import (
    named_tensors_from_proto,
    named_tensors_to_proto,
    tensor_from_proto,
    tensor_to_proto,
)

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

_FINISH = {reason: pb.FinishReason.Value(f"FINISH_REASON_{reason.name}") for reason in FinishReason}
_FINISH_BACK = {number: reason for reason, number in _FINISH.items()}


def response_to_proto(event: PromptInfo | Sequence[Completion]) -> pb.GenerateResponse:
    """One message of the stream."""
    # Filled in where they stand: a message that is given as a part is copied, with the interpreter held all the while.
    message = pb.GenerateResponse()
    if isinstance(event, PromptInfo):
        _fill_prompt_info(message.prompt, event)
        return message
    message.completions.SetInParent()
    for completion in event:
        _fill_completion(message.completions.items.add(), completion)
    return message


def response_from_proto(message: pb.GenerateResponse) -> PromptInfo | list[Completion]:
    """The inverse. Raises MalformedResponse."""
    match message.WhichOneof("event"):
        case "prompt":
            return prompt_info_from_proto(message.prompt)
        case "completions":
            return [completion_from_proto(item) for item in message.completions.items]
        case _:
            raise MalformedResponse("event: a response with neither prompt nor completions")


def prompt_info_to_proto(info: PromptInfo) -> pb.PromptInfo:
    """`PromptInfo` as a message."""
    message = pb.PromptInfo()
    _fill_prompt_info(message, info)
    return message


def _fill_prompt_info(message: pb.PromptInfo, info: PromptInfo) -> None:
    rest = pb.PromptInfo(
        group_id=info.group_id,
        actor_id=info.actor_id,
        unexpanded_ids=info.unexpanded_ids.tolist(),
        expanded_ids=info.expanded_ids.tolist(),
        media=[_media_use_to_proto(use) for use in info.media],
        suppressed_token_ids=info.suppressed_token_ids,
        prompt_logprobs=info.prompt_logprobs,
        prompt_logprobs_policy_version=info.prompt_logprobs_policy_version,
    )
    message.MergeFrom(rest)
    _fill_top(message.prompt_top_logprobs, info.prompt_top_logprobs)


def prompt_info_from_proto(message: pb.PromptInfo) -> PromptInfo:
    """Raises MalformedResponse for placeholders outside the prompt, odd hashes, logprobs that do not cover the ids."""
    num_ids = len(message.expanded_ids)
    for name in ("prompt_logprobs", "prompt_top_logprobs"):
        if len(getattr(message, name)) not in (0, num_ids):
            raise MalformedResponse(f"prompt.{name}: {len(getattr(message, name))} for {num_ids} expanded ids")
    is_scored = message.HasField("prompt_logprobs_policy_version")
    return PromptInfo(
        group_id=message.group_id,
        actor_id=message.actor_id,
        unexpanded_ids=_ids(message.unexpanded_ids),
        expanded_ids=_ids(message.expanded_ids),
        media=tuple(_media_use_from_proto(use, f"prompt.media[{i}]", num_ids) for i, use in enumerate(message.media)),
        suppressed_token_ids=tuple(message.suppressed_token_ids),
        prompt_logprobs=tuple(message.prompt_logprobs),
        prompt_top_logprobs=tuple(_top_from_proto(top) for top in message.prompt_top_logprobs),
        prompt_logprobs_policy_version=message.prompt_logprobs_policy_version if is_scored else None,
    )


def completion_to_proto(completion: Completion) -> pb.Completion:
    """`Completion` as a message."""
    message = pb.Completion()
    _fill_completion(message, completion)
    return message


def _fill_completion(message: pb.Completion, completion: Completion) -> None:
    rest = pb.Completion(
        trajectory_id=completion.trajectory_id,
        index=completion.index,
        token_ids=completion.token_ids.tolist(),
        logprobs=completion.logprobs.tolist(),
        finish_reason=_FINISH[completion.finish_reason],
        version_spans=[
            pb.VersionSpan(policy_version=span.policy_version, start=span.start, end=span.end)
            for span in completion.version_spans
        ],
        timing=pb.Timing(first_token_s=completion.first_token_s, finished_s=completion.finished_s),
        text=completion.text,
    )
    message.MergeFrom(rest)
    _fill_top(message.top_logprobs, completion.top_logprobs)
    if isinstance(completion.stop, int):
        message.stop_token_id = completion.stop
    elif completion.stop is not None:
        message.stop_string = completion.stop
    if completion.routed_experts is not None:
        message.routed_experts.CopyFrom(tensor_to_proto(completion.routed_experts))
    if (beam := completion.beam) is not None:
        message.beam.CopyFrom(pb.Beam(cumulative_logprob=beam.cumulative_logprob, score=beam.score))


def completion_from_proto(message: pb.Completion) -> Completion:
    """Raises MalformedResponse unless logprobs and version spans cover the tokens exactly."""
    num_tokens = len(message.token_ids)
    if len(message.logprobs) != num_tokens:
        raise MalformedResponse(f"completion: {len(message.logprobs)} logprobs for {num_tokens} tokens")
    if message.finish_reason not in _FINISH_BACK:
        raise MalformedResponse(f"completion: finish_reason {message.finish_reason} is not known")
    if len(message.top_logprobs) not in (0, num_tokens):
        raise MalformedResponse(f"completion: {len(message.top_logprobs)} top_logprobs for {num_tokens} tokens")
    stop = message.WhichOneof("stop")
    return Completion(
        trajectory_id=message.trajectory_id,
        index=message.index,
        token_ids=_ids(message.token_ids),
        logprobs=np.fromiter(message.logprobs, np.float32, num_tokens),
        finish_reason=_FINISH_BACK[message.finish_reason],
        version_spans=_spans(message.version_spans, num_tokens),
        first_token_s=message.timing.first_token_s,
        finished_s=message.timing.finished_s,
        text=message.text,
        top_logprobs=tuple(_top_from_proto(top) for top in message.top_logprobs),
        stop=getattr(message, stop) if stop is not None else None,
        beam=BeamScore(message.beam.cumulative_logprob, message.beam.score) if message.HasField("beam") else None,
        routed_experts=_experts(message.routed_experts, num_tokens) if message.HasField("routed_experts") else None,
    )


def _experts(message: pb.Tensor, num_tokens: int) -> Tensor:
    try:
        experts = tensor_from_proto(message, "completion.routed_experts")
    except InvalidRequest as error:
        raise MalformedResponse(error.message) from None
    if experts.dtype not in ("I16", "I32") or len(experts.shape) != 3 or experts.shape[0] < num_tokens - 1:
        raise MalformedResponse(
            f"completion.routed_experts: {experts.dtype} {list(experts.shape)} for {num_tokens} tokens"
        )
    return experts


def _fill_top(messages: "RepeatedCompositeFieldContainer[pb.TopLogprobs]", tops: Iterable[TopLogprobs]) -> None:
    for top in tops:
        messages.add(token_ids=top.token_ids, logprobs=top.logprobs)


def _top_from_proto(message: pb.TopLogprobs) -> TopLogprobs:
    if len(message.token_ids) != len(message.logprobs):
        raise MalformedResponse(f"top_logprobs: {len(message.logprobs)} logprobs for {len(message.token_ids)} ids")
    return TopLogprobs(tuple(message.token_ids), tuple(message.logprobs))


def _spans(messages: Iterable[pb.VersionSpan], num_tokens: int) -> tuple[VersionSpan, ...]:
    spans = tuple(VersionSpan(span.policy_version, span.start, span.end) for span in messages)
    position = 0
    for span in spans:
        if span.policy_version < 0:
            raise MalformedResponse(f"completion: version_spans of policy version {span.policy_version}")
        if span.start != position or span.end <= span.start:
            raise MalformedResponse("completion: version_spans are not contiguous")
        position = span.end
    if position != num_tokens:
        raise MalformedResponse(f"completion: version_spans cover {position} of {num_tokens} tokens")
    return spans


def _media_use_to_proto(use: MediaUse) -> pb.MediaUse:
    return pb.MediaUse(
        sha256=use.sha256,
        modality=MODALITY[use.modality],
        placeholder=pb.PlaceholderRange(offset=use.placeholder.offset, length=use.placeholder.length),
        num_tokens=use.num_tokens,
        grid_thw=use.grid_thw,
        processed=named_tensors_to_proto(use.processed),
    )


def _media_use_from_proto(message: pb.MediaUse, field: str, num_ids: int) -> MediaUse:
    run = PlaceholderRange(message.placeholder.offset, message.placeholder.length)
    if run.offset + run.length > num_ids or message.num_tokens > run.length:
        raise MalformedResponse(f"{field}.placeholder: lies outside the {num_ids} expanded ids")
    if len(message.sha256) != 32 or message.modality not in MODALITY_BACK:
        raise MalformedResponse(f"{field}: sha256 or modality is missing")
    try:
        processed = named_tensors_from_proto(message.processed, f"{field}.processed")
    except InvalidRequest as error:
        raise MalformedResponse(error.message) from None
    return MediaUse(
        sha256=message.sha256,
        placeholder=run,
        num_tokens=message.num_tokens,
        grid_thw=tuple(message.grid_thw),
        modality=MODALITY_BACK[message.modality],
        processed=processed,
    )


def _ids(values: Sequence[int]) -> IntArray:
    return np.fromiter(values, np.int32, len(values))
