"""Configuration of a training run: each section of the YAML file is a module here. Imports no torch.

`common.config.load_config` reads it.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from common.config import Config
from learner.config.algorithm import AlgorithmConfig
from learner.config.data import DataConfig
from learner.config.evaluation import EvaluationConfig
from learner.config.local import LocalConfig
from learner.config.model import ModelConfig
from learner.config.optimizer import OptimizerConfig
from learner.config.reward import RewardConfig
from learner.config.rollout import RolloutConfig
from learner.config.trainer import TrainerConfig
from learner.config.weights import WeightsConfig

__all__ = [
    "AlgorithmConfig",
    "DataConfig",
    "EvaluationConfig",
    "LearnerConfig",
    "LocalConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RolloutConfig",
    "TrainerConfig",
    "WeightsConfig",
]

# Half the distance from one bfloat16 number to the next around 0.02, a usual size of weights. A step of AdamW is about
# as long as the learning rate: a shorter one than this is rounded away.
_MIN_LR_BFLOAT16 = 2**-14


class LearnerConfig(Config):
    """One training run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Of the run, and of its folder."""
    seed: int = Field(0, ge=0)
    """Of the data order."""
    model: ModelConfig
    """The policy, and what of it trains."""
    data: DataConfig
    """Where the prompts come from."""
    reward: RewardConfig = RewardConfig()
    """What a completion is worth."""
    rollout: RolloutConfig = RolloutConfig()
    """How groups are sampled, and by whom."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """How rewards become a gradient."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its learning rate."""
    trainer: TrainerConfig
    """The loop, its checkpoints and its ranks."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is asked of the held-out rows."""
    weights: WeightsConfig = WeightsConfig()
    """How new weights reach the actors."""
    local: LocalConfig = LocalConfig()
    """What `outrider` starts on this machine."""
    runs_dir: Path = Path("runs")
    """Where run folders are made; relative paths here are relative to the working directory."""
    run_dir: Path | None = None
    """The run folder itself; None: `runs_dir/<name>-<time>`, or the newest unfinished one of this same
    configuration."""
    metrics_listen: str | None = None
    """Where ("host:port") Prometheus finds the metrics of rank 0 (learner/reporting/metrics.py); None: nowhere."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Where the numbers of metrics.jsonl go too (learner/reporting/trackers.py); each needs the package of its name."""
    tracing: bool = False
    """OpenTelemetry spans of rank 0 (common/tracing.py); the variables OTEL_* say where they go."""
    resume: bool = True
    """Continue the newest unfinished run of this same configuration."""

    @model_validator(mode="after")
    def _weights_move(self) -> Self:
        lr = self.optimizer.lr
        if self.model.dtype == "bfloat16" and self.model.adapter is None and lr < _MIN_LR_BFLOAT16:
            raise ValueError(
                f"optimizer.lr: steps of {lr:g} are rounded away where bfloat16 weights train; leave model.dtype at "
                "float32 and set model.compute_bfloat16, or train an adapter (model.lora_rank)"
            )
        return self

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> Self:
        if self.weights.merge_adapter and self.model.adapter is None:
            raise ValueError("weights.merge_adapter needs model.lora_rank or model.lora_adapter_path")
        if self.algorithm.overlong_buffer > self.rollout.max_tokens:
            raise ValueError("algorithm.overlong_buffer is longer than rollout.max_tokens")
        evaluates = {
            "trainer.eval_every": self.trainer.eval_every,
            "evaluation.samples": self.evaluation.samples,
            "data.max_held_out": self.data.max_held_out,
        }
        for name, value in evaluates.items():
            if value and not self.data.held_out and not self.data.held_out_fraction:
                raise ValueError(f"{name} needs rows to evaluate on: data.held_out or data.held_out_fraction")
        return self
