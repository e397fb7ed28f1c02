"""Configuration of a training run. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, FiniteFloat, model_validator

from common.config import Config
from common.rpc.options import DEFAULT_MAX_MESSAGE_BYTES
from common.types import MAX_STRING_CHARS, MAX_STRINGS, MAX_TOKEN_IDS
from learner.algorithms.config import AlgorithmConfig
from learner.data import DataConfig
from learner.model.config import Adapter, OptimizerConfig, Part

# Half the distance from one bfloat16 number to the next around 0.02, a usual size of weights. A step of AdamW is about
# as long as the learning rate: a shorter one than this is rounded away.
_MIN_LR_BFLOAT16 = 2**-14


class ModelConfig(Config):
    """The policy. Names as users of verl know them."""

    # Checkpoint directory in Hugging Face format; the actors load the same one.
    path: Path
    # Of the parameters. AdamW has no other copy of them: what trains in full is float32.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Parameters of dtype float32 are gathered and multiplied in bfloat16 (mixed precision).
    compute_bfloat16: bool = False
    # Parts that do not train; a run that freezes nothing by it, or everything, is refused.
    freeze_vision_tower: bool = False
    freeze_projector: bool = False
    freeze_language_model: bool = False
    enable_gradient_checkpointing: bool = False
    # Logprobs straight from hidden states: logits of all tokens never exist at once.
    use_fused_kernels: bool = False
    # Parameters, gradients and the optimizer stay in CPU memory; on a GPU is the layer that it works on.
    cpu_offload: bool = False
    # Layers go through torch.compile: faster on GPUs, after a minute or more in the first steps.
    use_torch_compile: bool = False
    # LoRA: train an adapter of this rank and nothing else. 0: off.
    lora_rank: int = Field(0, ge=0)
    lora_alpha: int = Field(16, gt=0)
    # "all-linear" or ends of module names: in the text model, never in the vision tower or the projector. Or one
    # regular expression for whole names: what it matches in the vision tower and the projector has an adapter too.
    target_modules: str | tuple[str, ...] = "all-linear"
    # Ends of module names.
    exclude_modules: tuple[str, ...] = ()
    # Go on with this adapter, a directory that PEFT wrote; rank, alpha and modules are then its own.
    lora_adapter_path: Path | None = None

    @property
    def frozen(self) -> tuple[Part, ...]:
        """The parts that do not train."""
        return tuple(part for part in get_args(Part) if getattr(self, f"freeze_{part}"))

    @property
    def adapter(self) -> Adapter | None:
        """The LoRA adapter that trains."""
        if not self.lora_rank and self.lora_adapter_path is None:
            return None
        return Adapter(
            self.lora_rank, self.lora_alpha, self.target_modules, self.exclude_modules, self.lora_adapter_path
        )

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> Self:
        for name in ("exclude_modules", "lora_alpha", "target_modules"):
            if not self.lora_rank and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} needs lora_rank")
        if self.lora_rank and self.lora_adapter_path is not None:
            raise ValueError("lora_adapter_path brings its own lora_rank; set one of them")
        return self


class RewardConfig(Config):
    """What a completion is worth."""

    # Each is one of those that come along (docs/rewards.md), one that a package offers by a name, or "module:function".
    # The reward of a completion is their weighted sum.
    functions: tuple[str, ...] = Field(("exact_match",), min_length=1)
    # One for each function; empty: 1 each.
    weights: tuple[FiniteFloat, ...] = ()
    # Seconds that the rewards of one group may take.
    timeout_s: float = Field(30.0, gt=0)
    # Groups scored at the same time, each in a process of its own.
    num_processes: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _one_weight_for_each(self) -> Self:
        if self.weights and len(self.weights) != len(self.functions):
            raise ValueError(
                f"there are {len(self.weights)} weights for {len(self.functions)} functions; give one for each, or none"
            )
        return self


class RolloutConfig(Config):
    """How groups are sampled, and by whom."""

    # Where the actors are: "host:port" of each, or "dns:///name:port" for one at each address of the name, which is
    # looked up again and again. The single-machine launcher fills it in.
    actors: tuple[str, ...] = ()
    # Directory with tls.crt, tls.key and ca.crt: mutual TLS with the actors (common/rpc/tls.py). None: plaintext.
    tls: Path | None = None
    # Of one message to or from an actor: at least the largest limits.max_message_bytes of the actors.
    max_message_bytes: int = Field(DEFAULT_MAX_MESSAGE_BYTES, ge=2**20, lt=2**31)
    # Completions of one prompt. Advantages compare them with each other, so there are at least two.
    n: int = Field(8, ge=2)
    # As far as actors sample.
    temperature: float = Field(1.0, ge=0.01, le=2)
    max_tokens: int = Field(256, ge=1)
    # Strings that end a completion, which they belong to: the reward sees them, and their tokens are trained.
    stop: tuple[Annotated[str, Field(min_length=1, max_length=MAX_STRING_CHARS)], ...] = Field(
        (), max_length=MAX_STRINGS
    )
    # What becomes of a group that is under way when its actor gets new weights. "continue": it goes on under them, and
    # its version spans say which token is whose. "restart": it is broken off and sampled again from its prompt, so that
    # all of it is of one version; a group that this has happened to three times goes on.
    on_update: Literal["continue", "restart"] = "continue"
    # Restrict sampling to these ids; empty: all.
    allowed_token_ids: tuple[int, ...] = Field((), max_length=MAX_TOKEN_IDS)
    # Sample another group in place of one whose rewards are all equal (dynamic sampling).
    drop_uniform_groups: bool = False
    # Seed of the sampling; None leaves it to the actors.
    seed: int | None = Field(None, ge=0, lt=2**30)
    # A group that takes longer on one actor is sent to another.
    group_timeout_s: float = Field(300.0, gt=0)
    # An actor that works on groups of which nothing comes for so long, while another actor gets on, is taken for hung:
    # its groups are sent to others. None: a third of group_timeout_s.
    hung_s: float | None = Field(None, gt=0)
    # Groups that one actor works on at once.
    slots_per_actor: int = Field(64, ge=1)
    # How long to wait for the first actor to answer, and whether for more than one.
    startup_timeout_s: float = Field(300.0, gt=0)
    min_actors: int = Field(1, ge=1)


class TrainerConfig(Config):
    """The loop."""

    total_steps: int = Field(ge=1)
    # Groups of one step of the run: what is sampled, trained and published together.
    batch_prompts: int = Field(ge=1)
    # Groups of one optimizer step; a part of batch_prompts. None: all of them.
    mini_batch_prompts: int | None = Field(None, ge=1)
    # How often the optimizer goes over a batch.
    epochs: int = Field(1, ge=1)
    # Policy versions that generation may run behind training. 0: strictly on-policy, synchronous.
    max_staleness: int = Field(0, ge=0)
    # Share of a group's tokens that may come from an older version still, by the version spans; with one more the
    # prompt is sampled again. 0: no token.
    max_stale_share: float = Field(0.0, ge=0, lt=1)
    # Tokens of one micro-batch on one rank.
    max_tokens_per_micro_batch: int = Field(8192, ge=1)
    # Steps between two evaluations on the held-out rows; the first and the last step always evaluate. 0: only those.
    eval_every: int = Field(0, ge=0)
    # Steps between two checkpoints; the last step always makes one. 0: only that.
    checkpoint_every: int = Field(20, ge=0)
    keep_checkpoints: int = Field(2, ge=1)
    # Groups of each step of which completions.jsonl in the run folder has prompt and completions; with them it also
    # has the first 64 rows of each evaluation. 0: there is no such file.
    log_completions: int = Field(1, ge=0)
    # Stop the run when an on-policy logprob of actor and learner differs by more. None: only report.
    max_parity_diff: float | None = Field(None, gt=0)
    # Stop it when they differ by more on average over a step, where it has 64 tokens to compare. Rounding, of quantised
    # actors too, stays far below this; what computes another function does not: a scaling that one side leaves out,
    # stale weights. None: only report.
    max_mean_parity_diff: float | None = Field(0.5, gt=0)
    # Ranks that share one copy of the parameters: on several nodes, the ranks of a node (hybrid sharding). None: all.
    fsdp_size: int | None = Field(None, ge=1)
    # Ranks that share each sequence (Ulysses), neighbours in rank order: the text model's activations fall by that
    # factor. It divides the attention heads. A micro-batch has so many times the tokens of max_tokens_per_micro_batch.
    sequence_parallel_size: int = Field(1, ge=1)
    # A rank that nothing has been heard of for so long is stopped or cut off: the job ends, to go on from its last
    # checkpoint. Each rank shows every second that it is there, on a thread of its own, while it loads, computes or
    # waits; what holds that up are libraries that keep Python's interpreter for seconds, and machines short of cores.
    rank_timeout_s: float = Field(30.0, ge=5)
    # None: CUDA if there is one.
    device: Literal["cpu", "cuda"] | None = None

    @property
    def num_mini_batches(self) -> int:
        """Optimizer steps of one epoch of a batch."""
        return self.batch_prompts // (self.mini_batch_prompts or self.batch_prompts)

    @model_validator(mode="after")
    def _whole_mini_batches(self) -> Self:
        if self.batch_prompts % (self.mini_batch_prompts or 1):
            raise ValueError(
                f"batch_prompts ({self.batch_prompts}) must be a multiple of mini_batch_prompts "
                f"({self.mini_batch_prompts})"
            )
        return self


class EvaluationConfig(Config):
    """What is asked of the held-out rows beside one greedy completion each."""

    # Sampled completions of each row, for pass@k. 0: none.
    samples: int = Field(0, ge=0)
    # pass@k: the chance that one of k sampled completions passes.
    k: tuple[Annotated[int, Field(ge=1)], ...] = (1,)
    temperature: float = Field(1.0, ge=0.01, le=2)
    # The reward at which a completion passes.
    pass_reward: float = 1.0
    # Share of the held-out rows that may go without a score because their reward or group fails. Accuracy is then the
    # mean of the others, and the run says of how many; with more the run ends.
    max_failed_share: float = Field(0.01, ge=0, lt=1)

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if self.samples and max(self.k) > self.samples:
            raise ValueError(f"k goes up to {max(self.k)}, but there are {self.samples} samples")
        for name in ("k", "temperature", "pass_reward"):
            if not self.samples and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} needs samples")
        return self


class WeightsConfig(Config):
    """How new weights reach the actors."""

    # None: nccl on CUDA, gloo on CPUs.
    backend: Literal["gloo", "nccl"] | None = None
    # Address of this machine as the actors reach it, where it listens for them. None: the one on the route to the first
    # actor that is not on loopback.
    host: str | None = None
    # Bound on opening an epoch and on staging one update.
    timeout_s: float = Field(30.0, gt=0)
    bucket_mib: int = Field(64, ge=1)
    # Send only what changed since the last version, bit by bit, where encoding it takes less time than it saves on the
    # link; actors keep a copy of what trains in their host's memory for it. Pays for bfloat16 on slow links.
    delta: bool = False
    # Dtype in which weights are sent; None: the one in which they are trained. Actors may compute in less than float32.
    dtype: Literal["bfloat16"] | None = None
    # LoRA: send the model with the adapter merged into it, also where all actors take adapters (vllm.max_lora_rank).
    merge_adapter: bool = False


class LocalConfig(Config):
    """What the single-machine launcher (`outrider`) starts beside the learner. The learner itself does not read it."""

    num_actors: int = Field(2, ge=0)
    num_ranks: int = Field(1, ge=1)
    # Actor i listens on base_port + i.
    base_port: int = Field(50051, ge=1, le=65000)
    # Configuration of the actors, as in `python -m actor --config`.
    actor: dict[str, Any] = Field(default_factory=dict)


class LearnerConfig(Config):
    """One training run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    # Of the data order.
    seed: int = Field(0, ge=0)
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    weights: WeightsConfig = WeightsConfig()
    local: LocalConfig = LocalConfig()
    # Where run folders are made; relative paths here are relative to the working directory.
    runs_dir: Path = Path("runs")
    # The run folder itself; None: `runs_dir/<name>-<time>`, or the newest unfinished one of this same configuration.
    run_dir: Path | None = None
    # "host:port" where Prometheus finds the metrics of rank 0 over HTTP (learner/metrics.py); None: nowhere.
    metrics_listen: str | None = None
    # Where the numbers of metrics.jsonl go too (learner/trackers.py); each needs the package of its name.
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    # OpenTelemetry spans of rank 0 (common/tracing.py); the variables OTEL_* say where they go.
    tracing: bool = False
    # Continue the newest unfinished run of this same configuration.
    resume: bool = True

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
