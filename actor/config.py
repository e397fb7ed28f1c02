"""Configuration of an actor. Imports no torch and no vllm.

`python -m actor.config FILE` only reads it, for the launcher of the learner, which cannot import it.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from common.checkpoint import check_checkpoint
from common.config import Config, ConfigError, load_config
from common.rpc.options import DEFAULT_MAX_MESSAGE_BYTES
from common.types import ServerLimits

# Limits that no single request can keep to, and so are no part of `ServerLimits`.
_NOT_TOLD = {"media_store_bytes", "max_held_media_bytes", "max_streams_per_peer"}


class LimitsConfig(Config):
    """What one request may ask for; see `ServerLimits`."""

    max_group_size: int = Field(256, ge=1)
    """Completions of one request."""
    max_media_bytes: int = Field(32 * 2**20, ge=1)
    """Of one media item, as it comes."""
    max_media_pixels: int = Field(16 * 2**20, ge=1)
    """Of an image, or of all frames of a video together."""
    max_message_bytes: int = Field(DEFAULT_MAX_MESSAGE_BYTES, ge=2**21, lt=2**31)  # a chunk of 1 MiB, and more
    """Of one message, in either direction."""
    max_queued_completions: int = Field(4096, ge=1)
    """Completions that run or wait, of all requests; a request beyond them is to come again."""
    media_store_bytes: int = Field(256 * 2**20, ge=0)
    """Media kept in memory as they came, so that requests can name them by sha256; and as many bytes of what their
    files decode to, so that each is decoded once."""
    max_held_media_bytes: int = Field(4 * 2**30, ge=2**20)
    """Media of all requests under way, as they came and decoded; more waits with the clients."""
    max_streams_per_peer: int = Field(1024, ge=1)
    """Calls of Generate and PutMedia that one caller may have open: an address, with the names of its certificate."""


class VllmConfig(Config):
    """Arguments of vLLM's engine, under vLLM's own names where it has one. None: vLLM decides."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights. auto: what vLLM takes for those of the checkpoint."""
    seed: int = 0
    """Of sampling that has no seed of its own."""
    max_model_len: int | None = Field(None, ge=1)
    """Tokens of a prompt and its completion together."""
    max_num_seqs: int = Field(256, ge=1)
    """Completions that run at once; further ones wait."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Tokens of one step, of all completions together."""
    block_size: int | None = Field(None, ge=1)
    """Tokens of one block of the cache of keys and values; samples of a group share the whole blocks of their prompt.
    By default 32 on CPUs, where vLLM would take 128, and on GPUs vLLM's choice."""
    enable_prefix_caching: bool = True
    """Compute what prompts have in common once."""
    enforce_eager: bool = False
    """No CUDA graphs and no compiled kernels: a quicker start, slower steps."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs, or processes on CPUs, that share the model."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory, for the model, its cache, and a second set of its weights while an update is staged."""
    kv_cache_gib: int = Field(1, ge=1)
    """CPU only: memory for keys and values."""
    cpu_cores: str | None = Field(None, pattern=r"^[0-9]+(-[0-9]+)?([,|][0-9]+(-[0-9]+)?)*$")
    """CPU only: the cores to run on, as "0-1,3" (with tensor parallelism in the form of VLLM_CPU_OMP_THREADS_BIND)."""
    max_images: int = Field(4, ge=0)
    """Images of one prompt."""
    max_videos: int = Field(0, ge=0)
    """Videos of one prompt, where the model takes them. vLLM reserves room for the longest one."""
    max_video_frames: int = Field(64, ge=1)
    """Frames of one video."""
    normalize_on_device: bool = True
    """Models that can rescale and normalize pixels themselves do so: less is sent to them. But processed tensors, those
    taken and those returned, are then the processor's without these two steps (uint8). False: with them, as usual."""
    max_logprobs: int = Field(64, ge=0)
    """Alternatives per token that a request may ask for; a beam search takes two for each beam."""
    return_routed_experts: bool = False
    """MoE models on GPUs: requests may ask which experts each token went through. Keeps them for what is in the
    cache."""
    max_lora_rank: int = Field(0, ge=0, le=512)
    """LoRA: take adapters up to this rank through the weight service. 0: none, which makes every layer a little
    faster."""
    max_loras: int = Field(1, ge=1)
    """Adapters that can be at hand, and in one batch, at the same time."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """More arguments of vLLM (`AsyncEngineArgs`), which the actor passes on as they are and knows nothing of:
    vllm.extra.kv_cache_dtype=fp8, 'vllm.extra.hf_overrides={rope_parameters: {...}}'."""
    shutdown_timeout_s: float = Field(1.0, ge=0)
    """Its processes are killed after so long; they hold nothing that is worth waiting for."""


class FakeConfig(Config):
    """The engine for tests: no model, made-up tokens, lengths and times that are a function of the request."""

    vocab_size: int = Field(320, ge=2)
    """Ids of tokens are below it."""
    max_context_tokens: int = Field(4096, ge=2)
    """Tokens of a prompt and its completion together."""
    max_images: int = Field(16, ge=0)
    """Images of one prompt."""
    max_videos: int = Field(4, ge=0)
    """Videos of one prompt."""
    max_video_frames: int = Field(64, ge=1)
    """Frames of one video."""
    max_logprobs: int = Field(64, ge=0)
    """Alternatives per token that a request may ask for."""
    tokens_per_image: int = Field(4, ge=1)
    """Of a video: of each frame."""
    mean_tokens: int = Field(8, ge=1)
    """Lengths are uniform on 1 to 2 * mean_tokens - 1."""
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """The lengths of a trace instead: what samples from seed k has lengths[k modulo their number] tokens."""
    start_s: float = Field(0.0, ge=0)
    """How long it starts."""
    first_token_s: float = Field(0.0, ge=0)
    """Until the first token of a completion."""
    token_s: float = Field(0.001, ge=0)
    """Until each further one."""
    commit_s: float = Field(0.0, ge=0)
    """How long a weight update stops generation."""
    max_num_seqs: int = Field(256, ge=1)
    """Completions that run at once; further ones wait."""
    num_workers: int = Field(1, ge=1)
    """Processes that take weights."""
    max_lora_rank: int = Field(0, ge=0)
    """As that of vLLM."""
    max_loras: int = Field(1, ge=1)
    """As that of vLLM."""
    die_at_group: int = Field(0, ge=0)
    """The engine dies when this group (counted from 1) starts; 0: never."""


class ActorConfig(Config):
    """One actor process."""

    model: Path | None = None
    """Checkpoint directory in Hugging Face format. The fake engine needs none."""
    listen: str = "127.0.0.1:50051"
    """Where gRPC is served, as "host:port"; port 0: any that is free."""
    engine: Literal["vllm", "fake"] = "vllm"
    """What generates; "fake" makes up its tokens."""
    metrics_listen: str | None = None
    """Where Prometheus finds the metrics over HTTP, as "host:port"; None: nowhere."""
    tracing: bool = False
    """OpenTelemetry spans (common/tracing.py); the variables OTEL_* say where they go."""
    standalone: bool = False
    """Serve the checkpoint as version 0 without a learner. On a GPU it keeps no room for updates."""
    tls: Path | None = None
    """Directory with tls.crt, tls.key and ca.crt: mutual TLS, and roles by certificate (common/rpc/tls.py)."""
    insecure: bool = False
    """Allow plaintext on an address that is not loopback."""
    health_listen: str | None = None
    """Where health alone is served in plaintext, for probes without a certificate, as "host:port"; None: nowhere."""
    grace_s: float = Field(20.0, ge=0)
    """Seconds that running groups get after SIGTERM."""
    idle_exit_s: float = Field(0.0, ge=0)
    """Exit after so long without a call; 0: never."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    limits: LimitsConfig = LimitsConfig()
    """What requests may ask for."""
    vllm: VllmConfig = VllmConfig()
    """The real engine."""
    fake: FakeConfig = FakeConfig()
    """The one for tests."""

    def server_limits(self, max_context_tokens: int, *, takes_videos: bool = True) -> ServerLimits:
        """The limits as clients see them; `takes_videos`: whether the model does."""
        engine = self.vllm if self.engine == "vllm" else self.fake
        return ServerLimits(
            max_context_tokens=max_context_tokens,
            max_media_items=engine.max_images,
            max_videos=engine.max_videos if takes_videos else 0,
            max_video_frames=engine.max_video_frames,
            max_logprobs=engine.max_logprobs,
            **self.limits.model_dump(exclude=_NOT_TOLD),
        )


def parse_cores(cores: str) -> frozenset[int]:
    """Numbers of the cores in a list of ranges.

    Example: "0-1,3" is {0, 1, 3}.
    """
    ends = [part.partition("-") for part in cores.split(",")]
    return frozenset(core for first, _, last in ends for core in range(int(first), int(last or first) + 1))


def check_model(path: Path | None) -> Path:
    """A directory that an engine can load, see `check_checkpoint`. Raises ConfigError."""
    if path is None:
        raise ConfigError("model: is missing; give a checkpoint directory with --model")
    return check_checkpoint(path, "model")


def main() -> int:
    """The exit code is 2 for a mistake of the user, which is the last line."""
    try:
        load_config(ActorConfig, Path(sys.argv[1]), [])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
