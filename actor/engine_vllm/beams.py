"""Beam search on vLLM: each step of each beam is one request for one token, whose prefix is in the cache."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actor.engine import EngineRequest
from actor.engine_vllm.beam_search import BeamSearch, FoundBeam, NextTokens
from actor.engine_vllm.outputs import NothingSampled, diverged, spans_of, top_logprobs
from actor.engine_vllm.sampling import extending_params
from common.errors import EngineDead, InvalidRequest
from common.types import BeamScore, Completion, FinishReason

if TYPE_CHECKING:
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.inputs import EngineInput
    from vllm.outputs import RequestOutput

Generate = Callable[["EngineInput", "VllmSamplingParams"], "AsyncGenerator[RequestOutput, None]"]


async def search_beams(
    request: EngineRequest,
    engine_input: Any,
    later_input: Any,
    *,
    max_context_tokens: int,
    eos_ids: Collection[int],
    generate: Generate,
) -> list[Completion]:
    """The best `n` beams, best first, without names and texts. `generate` streams what vLLM reports of one request.

    `later_input` is for every step but the first: the engine has had the media. Where it has dropped them since,
    `engine_input` brings them again. The prompt leaves room for a token.

    Raises InvalidRequest if there are fewer beams, and EngineDead.
    """
    wanted = request.sampling
    prompt_ids: list[int] = engine_input["prompt_token_ids"]
    room = max_context_tokens - len(prompt_ids)
    search = BeamSearch(
        num_beams=wanted.num_beams,
        max_tokens=min(wanted.max_tokens or room, room),
        num_prompt_tokens=len(prompt_ids),
        eos_ids=() if wanted.ignore_eos else eos_ids,
        length_penalty=1.0 if wanted.length_penalty is None else wanted.length_penalty,
    )
    parameters = extending_params(wanted)
    step_times: list[float] = []

    async def next_tokens(beam: FoundBeam) -> NextTokens:
        if beam.token_ids and later_input is not engine_input:
            with contextlib.suppress(NothingSampled):
                return await next_after(later_input, beam)
        return await next_after(engine_input, beam)

    async def next_after(media_input: Any, beam: FoundBeam) -> NextTokens:
        longer: Any = {**media_input, "prompt_token_ids": [*prompt_ids, *beam.token_ids]}
        async with contextlib.aclosing(generate(longer, parameters)) as outputs:
            async for output in outputs:
                [part] = output.outputs
                if part.finish_reason == "error":
                    raise NothingSampled("the engine could not begin a step of a beam")
                if part.finish_reason not in {"stop", "length"} or not part.weight_versions:
                    raise EngineDead(f"the engine broke a beam off ({part.finish_reason})")
                top = top_logprobs(part.logprobs, 0)
                if not top.token_ids:  # the constraints that go with beams leave some
                    raise diverged()
                return NextTokens(int(part.weight_versions[-1].version), top.token_ids, top.logprobs)
        raise EngineDead("the engine broke a beam off")

    async def extend(beams: Sequence[FoundBeam]) -> list[NextTokens]:
        tasks = [asyncio.ensure_future(next_tokens(beam)) for beam in beams]
        try:
            return await asyncio.gather(*tasks)
        finally:
            step_times.append(time.monotonic() - request.accepted_at)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    beams = await search.run(extend)
    if len(beams) < wanted.n:
        raise InvalidRequest("sampling.n", f"is {wanted.n}; there are only {len(beams)} beams")
    return [
        Completion(
            trajectory_id="",
            index=index,
            token_ids=np.asarray(beam.token_ids, np.int32),
            logprobs=np.asarray(beam.logprobs, np.float32),
            finish_reason=FinishReason.STOP if beam.is_finished else FinishReason.LENGTH,
            version_spans=spans_of(beam.versions),
            first_token_s=step_times[0],
            finished_s=time.monotonic() - request.accepted_at,
            beam=BeamScore(beam.cumulative_logprob, search.score(beam)),
        )
        for index, beam in enumerate(beams[: wanted.n])
    ]
