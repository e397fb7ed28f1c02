"""What the fake engine makes up beside tokens: alternatives, prompt logprobs, beam scores, processed tensors."""

from dataclasses import replace

import numpy as np

from actor.engine import EngineMedia, EngineRequest
from common.tensors import NamedTensor, tensor_of
from common.types import BeamScore, Completion, FloatArray, IntArray, PromptInfo, SamplingParams, TopLogprobs


def top_logprobs(token_ids: IntArray, logprobs: FloatArray, num_top: int, vocab_size: int) -> tuple[TopLogprobs, ...]:
    """The tokens themselves as the likeliest, and then the ids that follow them."""
    if not num_top:
        return ()
    return tuple(
        TopLogprobs(
            tuple((int(token_id) + rank) % vocab_size for rank in range(min(num_top, vocab_size))),
            tuple(float(logprob) - rank for rank in range(min(num_top, vocab_size))),
        )
        for token_id, logprob in zip(token_ids, logprobs, strict=True)
    )


def with_prompt_logprobs(
    info: PromptInfo, sampling: SamplingParams, vocab_size: int, policy_version: int
) -> PromptInfo:
    """A prompt with what was asked for about its tokens: every token as likely as every other."""
    if not (sampling.prompt_logprobs or sampling.prompt_top_logprobs):
        return info
    num_ids = len(info.expanded_ids)
    even = np.full(num_ids, -np.log(vocab_size), np.float32)
    even[:1] = 0
    top = top_logprobs(info.expanded_ids[1:], even[1:], sampling.prompt_top_logprobs, vocab_size)
    return replace(
        info,
        prompt_logprobs=tuple(even.tolist()) if sampling.prompt_logprobs else (),
        prompt_top_logprobs=(TopLogprobs(), *top) if sampling.prompt_top_logprobs else (),
        prompt_logprobs_policy_version=policy_version,
    )


def best_beams(
    beams: list[Completion], request: EngineRequest, num_prompt_tokens: int, actor_id: str
) -> list[Completion]:
    """Made-up completions as if a beam search had found them: the best `n`, best first."""
    sampling = request.sampling
    penalty = 1.0 if sampling.length_penalty is None else sampling.length_penalty
    scored = []
    for beam in beams:
        total = float(beam.logprobs.sum())
        score = total / (num_prompt_tokens + len(beam.token_ids)) ** penalty
        scored.append(replace(beam, beam=BeamScore(total, score)))
    scored.sort(key=lambda beam: beam.beam.score if beam.beam else 0.0, reverse=True)
    return [
        replace(beam, index=index, trajectory_id=request.trajectory_id(index, actor_id))
        for index, beam in enumerate(scored[: sampling.n])
    ]


def processed(item: EngineMedia) -> tuple[NamedTensor, ...]:
    """Tensors as they came; of an image or a video its pixels."""
    if isinstance(item.content, tuple):
        return item.content
    return (NamedTensor("pixels", tensor_of(np.asarray(item.content))),)
