"""`trainer`: the loop, its checkpoints and its ranks."""

from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from common.config import Config


class TrainerConfig(Config):
    """The loop."""

    total_steps: int | None = Field(None, ge=1)
    """Steps of the run, those before it was resumed included."""
    total_passes: FiniteFloat | None = Field(None, gt=0)
    """In place of total_steps, passes over the rows that train: as many steps as have whole batches in them, and at
    least one. A pass may end within a batch. Rows that come later stand in for those of dropped groups."""
    batch_prompts: int = Field(ge=1)
    """Groups of one step of the run: what is sampled, trained and published together."""
    mini_batch_prompts: int | None = Field(None, ge=1)
    """Groups of one optimizer step; a part of batch_prompts. None: all of them."""
    epochs: int = Field(1, ge=1)
    """How often the optimizer goes over a batch."""
    max_staleness: int = Field(0, ge=0)
    """Policy versions that generation may run behind training. 0: strictly on-policy, synchronous."""
    max_stale_share: float = Field(0.0, ge=0, lt=1)
    """Share of a group's tokens that may come from an older version still, by the version spans; with one more the
    prompt is sampled again. 0: no token."""
    max_tokens_per_micro_batch: int = Field(8192, ge=1)
    """Tokens of one micro-batch on one rank."""
    eval_every: int = Field(0, ge=0)
    """Steps between two evaluations on the held-out rows; the first and the last step always evaluate. 0: only
    those."""
    checkpoint_every: int = Field(20, ge=0)
    """Steps between two checkpoints; the last step always makes one. 0: only that."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints that stay in the run folder: the newest."""
    log_completions: int = Field(1, ge=0)
    """Groups of each step of which completions.jsonl in the run folder has prompt and completions; with them it also
    has the first 64 rows of each evaluation. 0: there is no such file."""
    max_parity_diff: float | None = Field(None, gt=0)
    """Stop the run when an on-policy logprob of actor and learner differs by more. None: only report."""
    max_mean_parity_diff: float | None = Field(0.5, gt=0)
    """Stop it when they differ by more on average over a step, or over the several that it takes to have 64 tokens to
    compare. Rounding, of quantised actors too, stays far below this; what computes another function does not: a scaling
    that one side leaves out, stale weights. None: only report."""
    fsdp_size: int | None = Field(None, ge=1)
    """Ranks that share one copy of the parameters: on several nodes, the ranks of a node (hybrid sharding). None:
    all."""
    sequence_parallel_size: int = Field(1, ge=1)
    """Ranks that share each sequence (Ulysses), neighbours in rank order: the text model's activations fall by that
    factor. It divides the attention heads. A micro-batch has so many times the tokens of
    max_tokens_per_micro_batch."""
    rank_timeout_s: float = Field(30.0, ge=5)
    """A rank that nothing has been heard of for so long is stopped or cut off: the job ends, to go on from its last
    checkpoint. Each rank shows every second that it is there, on a thread of its own, while it loads, computes or
    waits; what holds that up are libraries that keep Python's interpreter for seconds, and machines short of cores."""
    device: Literal["cpu", "cuda"] | None = None
    """Where the ranks compute. None: CUDA if there is one."""

    @property
    def num_steps(self) -> int:
        """Steps of the run, which `over` makes of passes."""
        assert self.total_steps is not None, "passes are not steps before the rows are there"
        return self.total_steps

    def over(self, num_rows: int) -> Self:
        """The same for so many rows that train: with steps in the place of passes."""
        if self.total_passes is None:
            return self
        steps = max(1, round(self.total_passes * num_rows) // self.batch_prompts)
        return self.model_copy(update={"total_steps": steps, "total_passes": None})

    def describe_length(self, num_rows: int) -> str:
        """In words, as "12 steps = 2 passes over 100 rows"."""
        steps, passes = self.over(num_rows).num_steps, self.total_passes
        over = f" = {passes:g} pass{'es' * (passes != 1)} over {num_rows} rows" if passes is not None else ""
        return f"{steps} step{'s' * (steps != 1)}{over}"

    @property
    def num_mini_batches(self) -> int:
        """Optimizer steps of one epoch of a batch."""
        return self.batch_prompts // (self.mini_batch_prompts or self.batch_prompts)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.total_steps is None) == (self.total_passes is None):
            both = ", not both; `null` unsets one" if self.total_steps else ""
            raise ValueError(f"set total_steps or total_passes{both}")
        return self

    @model_validator(mode="after")
    def _whole_mini_batches(self) -> Self:
        if self.batch_prompts % (self.mini_batch_prompts or 1):
            raise ValueError(
                f"batch_prompts ({self.batch_prompts}) must be a multiple of mini_batch_prompts "
                f"({self.mini_batch_prompts})"
            )
        return self
