"""The real engine: vLLM's AsyncLLM behind the `Engine` protocol."""

import asyncio
import contextlib
import functools
import gc
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from actor.config import VllmConfig
from actor.engine import EngineInfo, EngineLoad, EngineMedia, EngineRequest
from actor.engine_vllm.arguments import engine_config
from actor.engine_vllm.beams import search_beams
from actor.engine_vllm.outputs import NoProbability, NothingSampled, Sample, diverged, top_logprobs
from actor.engine_vllm.probes import probe_model
from actor.engine_vllm.prompts import VllmPrompts
from actor.engine_vllm.sampling import refusal, sampling_params, scoring_params
from actor.engine_vllm.updates import VllmUpdates
from actor.validation.sampling import check_prompt_logprobs
from actor.weights.adapters import Adapters
from common.config import ConfigError
from common.errors import EngineDead, InvalidRequest, QueueFull, Unimplemented, WeightsPending
from common.types import (
    Completion,
    EpochSpec,
    FinishReason,
    Manifest,
    PromptInfo,
    SamplingParams,
    TopLogprobs,
)

if TYPE_CHECKING:
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.inputs import EngineInput
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

    from actor.engine_vllm.cache_load import CacheLoad

_WARM_UP_TOKENS = 4
# What is new is looked through often and quickly; everything, for tens of milliseconds in which nothing else runs, once
# in some minutes under full load. By default that would be each second, and vLLM leaves no garbage there.
_GC_THRESHOLDS = (500, 2, 20_000)


class VllmEngine:
    """One vLLM engine, its worker processes included."""

    def __init__(self, model: Path, config: VllmConfig, actor_id: str, *, takes_updates: bool = True) -> None:
        """Without `takes_updates` there is no room for them on a GPU."""
        self._model = model
        self._takes_updates = takes_updates
        self._config = config
        self._actor_id = actor_id
        self._engine: AsyncLLM | None = None
        self._prompts: VllmPrompts
        self._eos_ids: frozenset[int] = frozenset()
        self._adapters = Adapters(model.resolve().name, config.max_lora_rank, config.max_loras)
        self._updates = VllmUpdates(self._require, self._adapters)
        self._cache: CacheLoad | None = None

    # ------------------------------------------------------------------------------------------------ life

    def load_model(self) -> None:
        """Start vLLM's processes and load the model; tens of seconds. Call it before `start`, from the main thread.

        A signal whose handler raises ends it there. vLLM, on a thread of its own, would go on.
        """
        config = engine_config(self._model, self._config, takes_updates=self._takes_updates)
        from vllm.v1.engine.async_llm import AsyncLLM

        from actor.engine_vllm.groups import send_groups

        self._engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        send_groups(self._engine)

    async def start(self) -> EngineInfo:
        """See `Engine.start`."""
        import vllm

        from actor.engine_vllm.cache_load import CacheLoad

        assert self._engine is not None
        await self._engine.update_weight_version("0")
        if self._config.max_lora_rank:
            await self._updates.take_adapters()
        model_config = self._engine.model_config
        max_item_tokens = self._engine.input_processor.mm_encoder_cache_size
        self._prompts = VllmPrompts(self._model, self._engine.renderer, model_config, self._actor_id, max_item_tokens)
        self._eos_ids = _eos_ids(self._engine.renderer.get_eos_token_id(), model_config.try_get_generation_config())
        info = EngineInfo(
            name="vllm",
            version=vllm.__version__,
            architecture=model_config.architectures[0],
            max_context_tokens=model_config.max_model_len,
            vocab_size=model_config.get_vocab_size(),
            num_workers=self._engine.vllm_config.parallel_config.world_size,
            suppressed_token_ids=self._prompts.placeholder_ids,
            takes_videos=self._prompts.takes_videos,
            max_lora_rank=self._config.max_lora_rank,
        )
        await self._warm_up()
        self._cache = CacheLoad(self._engine)
        # vLLM makes many small objects at each step. Looking for garbage among all modules costs a tenth of the time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        return info

    async def _warm_up(self) -> None:
        """The first batch compiles kernels, for seconds: let that be ours, with an image if the model takes one.

        Raises ConfigError where there is no room for so little.
        """
        has_images = bool(self._prompts.placeholder_ids) and self._config.max_images > 0
        request = EngineRequest(
            group_id="warm-up",
            prompt=self._prompts.greeting(has_image=has_images),
            media=(EngineMedia(bytes(32), Image.new("RGB", (64, 64), "gray")),) if has_images else (),
            sampling=SamplingParams(n=2, max_tokens=_WARM_UP_TOKENS, ignore_eos=True),
        )
        try:
            async for _ in self.generate(request):
                pass
        except InvalidRequest as error:
            raise ConfigError(f"vllm.max_model_len is too small: {error.message}") from error
        await self._require().reset_prefix_cache()

    async def check(self) -> None:
        """See `Engine.check`. A step may take as long as vLLM's executors wait for one."""
        from vllm import envs
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._require().check_health()
        except EngineDeadError as error:
            raise EngineDead("the vLLM engine has died; its log says why") from error
        if self._cache is not None and self._cache.unanswered_s > (limit_s := envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS):
            raise EngineDead(f"the vLLM engine has not answered for {limit_s} s (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)")

    def adapters(self) -> tuple[str, ...]:
        """See `Engine.adapters`."""
        return self._adapters.names

    def load(self) -> EngineLoad:
        """See `Engine.load`."""
        engine, cache = self._engine, self._cache
        if engine is None or cache is None:
            return EngineLoad(0, 0)
        unfinished = engine.get_num_unfinished_requests()
        running = min(unfinished, self._config.max_num_seqs)
        return EngineLoad(running, unfinished - running, cache.usage, cache.num_preemptions)

    async def stop(self) -> None:
        """See `Engine.stop`."""
        engine, self._engine = self._engine, None
        if self._cache is not None:
            self._cache.stop()
        if engine is not None:
            if engine.output_handler is not None:  # it would take the end of its engine for a failure
                engine.output_handler.cancel()
            await asyncio.to_thread(engine.shutdown, self._config.shutdown_timeout_s)

    # ------------------------------------------------------------------------------------------------ generation

    async def generate(self, request: EngineRequest) -> AsyncIterator[PromptInfo | list[Completion]]:
        """See `Engine.generate`."""
        from vllm.v1.engine.exceptions import EngineDeadError

        wanted = request.sampling
        if request.return_routed_experts:
            self._check_experts(wanted)
        self._adapters.find(request.model)
        scores_prompt = wanted.prompt_logprobs or wanted.prompt_top_logprobs > 0
        is_answered = False
        try:
            # Several requests will carry the same items: a worker might have dropped them between two.
            with_tensors = request.return_processed or scores_prompt or wanted.num_beams > 0
            info, engine_input = await self._prompts.understand(request, with_tensors=with_tensors)
            yield await self._score_prompt(request, info, engine_input) if scores_prompt else info
            answers = self._search if wanted.num_beams else self._sample_twice
            try:
                async with contextlib.aclosing(answers(request, engine_input)) as events:
                    async for event in events:
                        is_answered = True
                        yield event
            except NoProbability as blamed:
                # Once more with the media: the worker may have dropped them.
                _, engine_input = await self._prompts.understand(request, with_tensors=True)
                await probe_model(engine_input, blamed.token_ids, functools.partial(self._outputs, request=request))
                raise
        except NothingSampled as error:
            if wanted.structured_output is None:
                raise
            raise InvalidRequest("sampling.structured_output", "vLLM cannot compile it") from error
        except EngineDeadError as error:
            raise EngineDead("the vLLM engine has died; its log says why") from error
        finally:
            if not is_answered:
                self._prompts.forget(request.media)

    async def _sample_twice(
        self, request: EngineRequest, engine_input: "EngineInput"
    ) -> AsyncGenerator[list[Completion], None]:
        """As `_sample`; once more, with the media themselves, if a worker lacks those that it was believed to have.

        That happens to requests that meet one that brought the same media and failed before the worker saw it.
        """
        for is_last in (not request.media, True):
            is_answered = False
            try:
                async with contextlib.aclosing(self._sample(request, engine_input)) as events:
                    async for event in events:
                        is_answered = True
                        yield event
                return
            except NothingSampled:
                if is_answered or is_last:
                    raise
            _, engine_input = await self._prompts.understand(request, with_tensors=True)

    async def _sample(
        self, request: EngineRequest, engine_input: "EngineInput"
    ) -> AsyncGenerator[list[Completion], None]:
        """Completions as they finish."""
        from vllm.exceptions import VLLMClientError

        try:
            parameters = sampling_params(request.sampling, return_text=request.return_text)
        except (ValueError, VLLMClientError) as error:
            raise refusal(error) from error
        samples: dict[int, Sample] = {}
        async with contextlib.aclosing(self._outputs(engine_input, parameters, request)) as outputs:
            async for output in outputs:
                now_s = time.monotonic() - request.accepted_at
                finished: list[Callable[[], Completion]] = []
                for part in output.outputs:
                    if part.index not in samples:
                        samples[part.index] = Sample(now_s, request.sampling.top_logprobs)
                    samples[part.index].add(part)
                    if part.finish_reason is not None:
                        sample = samples.pop(part.index)
                        name = request.trajectory_id(part.index, self._actor_id)
                        finished.append(functools.partial(sample.completion, part, request, name, finished_s=now_s))
                if finished:  # alternatives hold up the loop
                    has_many = request.sampling.top_logprobs > 0
                    yield await asyncio.to_thread(_call_all, finished) if has_many else _call_all(finished)

    async def _search(
        self, request: EngineRequest, engine_input: "EngineInput"
    ) -> AsyncGenerator[list[Completion], None]:
        """The best beams, all at once."""
        beams = await search_beams(
            request,
            engine_input,
            self._prompts.by_name(engine_input),
            max_context_tokens=self._require().model_config.max_model_len,
            eos_ids=self._eos_ids,
            generate=functools.partial(self._outputs, request=request),
        )
        yield [
            replace(
                beam,
                trajectory_id=request.trajectory_id(beam.index, self._actor_id),
                text=await self._text(request, beam),
            )
            for beam in beams
        ]

    async def _outputs(
        self, engine_input: "EngineInput", parameters: "VllmSamplingParams", request: EngineRequest
    ) -> "AsyncGenerator[RequestOutput, None]":
        """What vLLM reports. Raises InvalidRequest for what it does not take, QueueFull, and as `_check_model`."""
        from vllm.exceptions import GracefulHTTPError, VLLMClientError

        engine, name, lora = self._require(), request.group_id, self._lora_request(request.model)
        prompt: Any = engine_input
        try:
            if parameters.structured_outputs is not None:
                # vLLM parses the grammar when it takes a request, for up to some tenths of a second: not on this loop.
                prompt = await engine.input_processor.process_inputs_async(
                    name,
                    engine_input,
                    parameters,
                    supported_tasks=await engine.get_supported_tasks(),
                    lora_request=lora,
                )
            async with contextlib.aclosing(
                engine.generate(prompt, parameters, request_id=name, lora_request=lora)
            ) as outputs:
                async for output in outputs:
                    self._check_model(request.model, lora)
                    yield output
        except (ValueError, VLLMClientError) as error:  # only while it looks at the request
            raise refusal(error, is_structured=parameters.structured_outputs is not None) from error
        except GracefulHTTPError as error:  # its own bounds on what waits, which `vllm.extra` can set
            raise QueueFull(error.message) from error

    def _lora_request(self, model: str) -> "LoRARequest | None":
        """The adapter that answers. Raises InvalidRequest for one that is not here."""
        from vllm.lora.request import LoRARequest

        adapter = self._adapters.find(model)
        if adapter is None:
            return None
        # The path is only a name: vLLM keeps cached prefixes apart by it.
        return LoRARequest(adapter.name, adapter.number, f"{adapter.name}@{adapter.policy_version}")

    def _check_model(self, model: str, lora: "LoRARequest | None") -> None:
        """Raises WeightsPending where the policy has become an adapter, InvalidRequest where a named one has gone.

        vLLM binds a request to its adapter when it is queued. After a swap under it, the base model alone answers.
        """
        adapter = self._adapters.find(model)
        if not model and adapter is not None and (lora is None or lora.lora_name != adapter.name):
            raise WeightsPending(f"{adapter.name!r} is the policy now, and this request began without it: ask again")

    async def _score_prompt(self, request: EngineRequest, info: PromptInfo, engine_input: "EngineInput") -> PromptInfo:
        """Add the logprobs of the prompt, from a request of its own: it cannot use the prefix cache, the group can.

        Raises TooLarge before anything is computed.
        """
        wanted = request.sampling
        check_prompt_logprobs(wanted, len(info.expanded_ids), request.max_message_bytes)
        parameters = scoring_params(wanted.prompt_top_logprobs)
        reported = [output async for output in self._outputs(engine_input, parameters, request)]
        flats: list[Any] = [output.prompt_logprobs for output in reported if output.prompt_logprobs]
        if len(flats) != 1 or len(flats[0]) != len(info.expanded_ids):
            raise EngineDead("the engine gave no logprobs of the prompt")
        # A commit lets the prompt be computed again from its start, so that its one token has the version of all.
        [span] = reported[-1].outputs[0].weight_versions or []
        info = replace(info, prompt_logprobs_policy_version=int(span.version))
        return await asyncio.to_thread(_with_logprobs, info, flats[0], wanted)  # takes seconds for many alternatives

    def _check_experts(self, wanted: SamplingParams) -> None:
        """Raises Unimplemented and InvalidRequest where routed experts cannot be returned."""
        if not self._config.return_routed_experts:
            raise Unimplemented("returns.routed_experts", "this server was started without vllm.return_routed_experts")
        if wanted.num_beams:
            raise InvalidRequest("returns.routed_experts", "is not for beams; leave one of them out")

    async def _text(self, request: EngineRequest, beam: Completion) -> str:
        """Of a beam, without the end-of-sequence id, as vLLM gives that of a sample."""
        if not request.return_text:
            return ""
        token_ids = beam.token_ids.tolist()
        token_ids = token_ids[:-1] if beam.finish_reason is FinishReason.STOP else token_ids
        return await self._prompts.text(token_ids, skip_special_tokens=request.sampling.skip_special_tokens)

    # ------------------------------------------------------------------------------------------------ weights

    async def open_epoch(self, spec: EpochSpec) -> None:
        """See `Engine.open_epoch`."""
        await self._updates.open_epoch(spec)

    async def stage(self, manifest: Manifest, timeout_s: float) -> tuple[int, ...]:
        """See `Engine.stage`."""
        return await self._updates.stage(manifest, timeout_s)

    async def commit(self, policy_version: int) -> float:
        """See `Engine.commit`. Requests in flight are kept and go on under the new weights."""
        return await self._updates.commit(policy_version)

    async def pause(self) -> None:
        """See `Engine.pause`."""
        await self._updates.pause()

    async def resume(self) -> None:
        """See `Engine.resume`."""
        await self._updates.resume()

    async def abort_epoch(self) -> None:
        """See `Engine.abort_epoch`."""
        await self._updates.abort_epoch()

    def _require(self) -> "AsyncLLM":
        if self._engine is None:
            raise EngineDead("the engine is not running")
        return self._engine


def _call_all(jobs: Sequence[Callable[[], Completion]]) -> list[Completion]:
    return [job() for job in jobs]


def _with_logprobs(info: PromptInfo, flat: Any, wanted: SamplingParams) -> PromptInfo:
    """`info` with the logprobs of its prompt that are wanted, from vLLM's. Raises EngineDead where they are none."""
    places = range(1, len(info.expanded_ids))  # vLLM has nothing for the first
    own = [flat.logprobs[flat.start_indices[place]] for place in places]
    if not all(map(math.isfinite, own)):
        raise diverged()
    top = [top_logprobs(flat, place) for place in places] if wanted.prompt_top_logprobs else []
    return replace(
        info,
        prompt_logprobs=(0.0, *own) if wanted.prompt_logprobs else (),
        prompt_top_logprobs=(TopLogprobs(), *top) if wanted.prompt_top_logprobs else (),
    )


def _eos_ids(of_tokenizer: int | None, generation_config: dict[str, Any]) -> frozenset[int]:
    """Every id that ends a sampled completion."""
    ids = generation_config.get("eos_token_id") or []
    return frozenset([*([ids] if isinstance(ids, int) else ids), *([] if of_tokenizer is None else [of_tokenizer])])
