"""A group crosses to vLLM's engine process as one request, which becomes one for each sample there.

vLLM sends a request for each sample, with the prompt's ids and the tensors of its images in each: of an image of a
megapixel 24 MB, which a group of sixteen sends and holds sixteen times.
"""

import functools
from collections.abc import Callable
from copy import copy
from typing import Any

from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.parallel_sampling import ParentRequest


def send_groups(engine: AsyncLLM) -> None:
    """Let this front end send each group as one request, to an engine process with `take_groups`."""
    send = engine.engine_core.add_request_async

    async def send_group(request: EngineCoreRequest) -> None:
        """vLLM calls it with the request of each sample, once the output processor knows all of them."""
        state = engine.output_processor.request_states.get(request.request_id)
        if state is None:  # aborted
            return
        if state.parent_req is None:
            await send(request)
        elif state.request_index == 0:
            group = copy(request)
            group.request_id = state.parent_req.request_id
            group.sampling_params = state.parent_req.sampling_params
            await send(group)

    engine.engine_core.add_request_async = send_group


@functools.cache
def take_groups() -> None:
    """Let the engine process make a group's requests itself, by vLLM's own rule for their ids and seeds."""

    def preprocess_samples(self: Any, request: EngineCoreRequest) -> Any:
        *others, last = [EngineCore.preprocess_add_request(self, sample) for sample in _samples(request)]
        for other in others:
            self.input_queue.put_nowait((EngineCoreRequestType.ADD, other))
        return last  # which vLLM puts behind them

    EngineCoreProc.preprocess_add_request = preprocess_samples
    EngineCoreProc._handle_request_preproc_error = _for_each_sample(EngineCoreProc._handle_request_preproc_error)  # noqa: SLF001
    EngineCoreProc._handle_mm_cache_miss = _for_each_sample(EngineCoreProc._handle_mm_cache_miss)  # noqa: SLF001


def _samples(request: EngineCoreRequest) -> list[EngineCoreRequest]:
    """The request of each sample; they share everything but their ids, and their seeds if there is one."""
    if request.sampling_params is None or request.sampling_params.n == 1:
        return [request]
    parent, samples = ParentRequest(request), []
    for index in range(request.sampling_params.n):
        sample = copy(request)
        sample.request_id, sample.sampling_params = parent.get_child_info(index)
        samples.append(sample)
    return samples


def _for_each_sample(tell_of_failure: Callable[..., None]) -> Callable[..., None]:
    """The front end knows a group's samples and waits for each."""

    @functools.wraps(tell_of_failure)
    def tell_all(self: Any, request: EngineCoreRequest, *args: Any) -> None:
        for sample in _samples(request):
            tell_of_failure(self, sample, *args)

    return tell_all
