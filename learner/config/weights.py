"""`weights`: how new weights reach the actors."""

from typing import Literal

from pydantic import Field

from common.config import Config


class WeightsConfig(Config):
    """How new weights reach the actors."""

    backend: Literal["gloo", "nccl"] | None = None
    """Of torch.distributed. None: gloo on CPUs, and where an actor has several GPUs, whose own NCCL calls nothing
    orders against those of weights; else nccl."""
    host: str | None = None
    """Address of this machine as the actors reach it, where it listens for them. None: the one on the route to the
    first actor that is not on loopback."""
    timeout_s: float = Field(30.0, gt=0)
    """Bound on opening an epoch and on staging one update."""
    bucket_mib: int = Field(64, ge=1)
    """Size of the pieces in which weights are sent."""
    delta: bool = False
    """Send only what changed since the last version, bit by bit, where encoding it takes less time than it saves on the
    link; actors keep a copy of what trains in their host's memory for it. Pays for bfloat16 on slow links."""
    dtype: Literal["bfloat16"] | None = None
    """Dtype in which weights are sent; None: the one in which they are trained. Actors may compute in less than
    float32."""
    merge_adapter: bool = False
    """LoRA: send the model with the adapter merged into it, also where all actors take adapters
    (vllm.max_lora_rank)."""
