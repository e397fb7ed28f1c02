"""How vLLM is started: its arguments from the actor's settings, what CPUs need, and what vLLM cannot do there."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actor.config import VllmConfig, parse_cores
from actor.engine_vllm.refused_settings import check_extra, refused_settings
from actor.engine_vllm.rope_context import context_within_rope
from actor.engine_vllm.update_room import check_host_room, host_memory, utilization_beside_updates
from common.config import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig as EngineConfig

# With this, vLLM reports a sample's first token and its end and nothing between. It keeps to it only where it reports
# what is new (DELTA): in the other modes each token comes with all tokens before it.
_FIRST_AND_LAST_ONLY = 2**30
# Said, or the engine takes the one that fits its first structured request, and its front end another for each.
# `actor.engine_vllm.grammars` bounds this one.
STRUCTURE_BACKEND: Literal["xgrammar"] = "xgrammar"
# The smallest that its fast attention takes. In its own blocks of 128 a group of short prompts has nothing in common.
_CPU_BLOCK_SIZE = 32
# What vLLM takes as the largest rank.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def engine_config(model: Path, config: VllmConfig, *, takes_updates: bool = True) -> "EngineConfig":
    """Set up this process for the engine, and say what it is to be.

    Raises ConfigError for what vLLM refuses, for what it cannot do on CPUs, or does wrong there without a word, and for
    a GPU, or a host, that is too small.
    """
    _set_up_process(config)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    from actor.engine_vllm.plugin import ACTOR_VARIABLE, register

    os.environ[ACTOR_VARIABLE] = str(os.getpid())
    register()
    own = _own_arguments(model, config, is_cpu=current_platform.is_cpu())
    check_extra(config.extra, own, takes_updates=takes_updates)
    with refused_settings(config.extra):
        arguments = AsyncEngineArgs(**own, **config.extra)
        model_config = arguments.create_model_config()
        if takes_updates and model_config.model_arch_config.quantization_config is not None:
            raise ConfigError(
                "model: the checkpoint is quantized, and updates would come without its scales; start from the "
                "unquantized checkpoint with vllm.extra.quantization"
            )
        arguments.max_model_len = context_within_rope(model_config, config.max_model_len, takes_updates=takes_updates)
        # As `actor.engine_vllm.shadow.can_shadow`, which asks the loaded model.
        has_second_set = not (model_config.quantization or model_config.use_mla or model_config.get_num_experts())
        if takes_updates and not has_second_set:
            check_host_room(model, num_workers=config.tensor_parallel_size, limit_bytes=host_memory())
        if current_platform.is_cpu():
            _check_cpu(model_config, config)
        elif takes_updates:
            arguments.gpu_memory_utilization = utilization_beside_updates(
                model,
                config.gpu_memory_utilization,
                total_bytes=current_platform.get_device_total_memory(),
                element_bytes=model_config.dtype.itemsize,
                num_gpus=config.tensor_parallel_size,
                has_second_set=has_second_set,
            )
        return arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)


def _set_up_process(config: VllmConfig) -> None:
    """What vLLM and its processes take from the environment."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Its processes speak msgpack to each other; what that does not know would go as a pickle.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "0"
    # Forked ones, its choice for GPUs, take its plug-ins for loaded: `actor.engine_vllm.plugin` would not run in them.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib)


def _own_arguments(model: Path, config: VllmConfig, *, is_cpu: bool) -> dict[str, Any]:
    """Of `AsyncEngineArgs`."""
    from vllm.config import StructuredOutputsConfig

    from actor.engine_vllm.plugin import WEIGHT_TRANSFER_BACKEND
    from actor.engine_vllm.suppression import SUPPRESSION

    return {
        "model": str(model),
        "served_model_name": [model.name],
        "dtype": config.dtype,
        "seed": config.seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "block_size": config.block_size or (_CPU_BLOCK_SIZE if is_cpu else None),
        "enable_prefix_caching": config.enable_prefix_caching,
        "enforce_eager": config.enforce_eager,
        "tensor_parallel_size": config.tensor_parallel_size,
        "data_parallel_size": 1,  # several engines are several actors
        "distributed_executor_backend": set_up_cpus(config) if is_cpu else None,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "limit_mm_per_prompt": _media_limits(config),
        # On a GPU the cache gets what is left beside the largest images and videos. On CPUs its size is said, and
        # encoding them would only take long.
        "skip_mm_profiling": is_cpu,
        "mm_device_do_normalize": config.normalize_on_device,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": config.max_logprobs,
        "enable_return_routed_experts": config.return_routed_experts,
        "generation_config": "vllm",
        "structured_outputs_config": StructuredOutputsConfig(backend=STRUCTURE_BACKEND),
        "stream_interval": _FIRST_AND_LAST_ONLY,
        "logits_processors": [SUPPRESSION],
        "worker_extension_cls": "actor.engine_vllm.worker.WorkerExtension",
        "weight_transfer_config": {"backend": WEIGHT_TRANSFER_BACKEND},
        **_lora_arguments(config),
        "disable_log_stats": True,
        "enable_log_requests": False,
    }


def set_up_cpus(config: VllmConfig) -> str | None:
    """Cores of the engine; vLLM's name of the executor to use, None for its own choice."""
    from actor.engine_vllm.plugin import CORES_VARIABLE

    cores = config.cpu_cores
    if config.tensor_parallel_size > 1:
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


def _check_cpu(model_config: Any, config: VllmConfig) -> None:
    """Raises ConfigError for what vLLM on CPUs cannot do, or does wrong without a word."""
    if model_config.is_mm_prefix_lm:
        raise ConfigError(
            "model: the tokens of an image see each other in both directions in this model, which vLLM's attention"
            " on CPUs leaves out; use a GPU, or set vllm.max_images and vllm.max_videos to 0"
        )
    if config.return_routed_experts:
        raise ConfigError("vllm.return_routed_experts: vLLM's model runner that returns them needs Triton; use a GPU")


def _media_limits(config: VllmConfig) -> dict[str, Any]:
    """Items of a prompt. The frames are those of the made-up video with which vLLM sizes its buffers."""
    videos = {"count": config.max_videos, "num_frames": config.max_video_frames}
    return {"image": config.max_images, "video": videos if config.max_videos else 0}


def _lora_arguments(config: VllmConfig) -> dict[str, Any]:
    if not config.max_lora_rank:
        return {"enable_lora": False}
    rank = next(rank for rank in _LORA_RANKS if rank >= config.max_lora_rank)
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": config.max_loras}
