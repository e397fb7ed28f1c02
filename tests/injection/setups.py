"""The two jobs that faults happen to: many cheap ones to actors with the fake engine, some to actors with vLLM."""

from dataclasses import dataclass
from typing import Literal

MAX_PARITY_DIFF = 1e-4


@dataclass(frozen=True, slots=True)
class Setup:
    """What differs between them. `cells` are patterns of those that happen if none are asked for."""

    engine: Literal["fake", "vllm"]
    cells: tuple[str, ...]
    num_actors: int
    start_s: float
    """From the start of a process to its first useful act, on a busy machine."""
    batch_prompts: int
    actor: tuple[str, ...]
    """Settings of each."""
    learner: tuple[str, ...]

    @property
    def actors(self) -> tuple[str, ...]:
        """The names of their machines."""
        return tuple(f"actor-{i}" for i in range(self.num_actors))

    @property
    def has_parity(self) -> bool:
        """Whether actors sample by the weights that they were sent, so that their logprobs must be the learner's."""
        return self.engine == "vllm"

    @property
    def is_apart(self) -> bool:
        """Whether weights arrive in another process than the one that answers the learner: in vLLM's engine core."""
        return self.engine == "vllm"


FAKE = Setup(
    engine="fake",
    cells=("*",),
    num_actors=3,
    start_s=300.0,
    batch_prompts=2,
    actor=("fake.vocab_size=256", "fake.mean_tokens=3", "fake.first_token_s=0.5"),
    learner=(
        *("rollout.n=2", "algorithm.clip_low=1", "algorithm.clip_high=1000", "trainer.max_staleness=1"),
        "trainer.max_mean_parity_diff=null",
    ),
)

VLLM = Setup(
    engine="vllm",
    cells=("actor/stage/*", "actor/commit/kill", "rank-0/stage/kill"),
    num_actors=2,
    start_s=600.0,
    batch_prompts=4,
    actor=(
        *("vllm.dtype=float32", "vllm.max_model_len=128", "vllm.max_num_seqs=64", "vllm.max_num_batched_tokens=2048"),
        *("vllm.block_size=32", "vllm.enforce_eager=true", "vllm.max_images=1"),
    ),
    # With each step logprobs change by far more than the bound, so that an actor that has missed one is seen.
    learner=(
        *("rollout.n=4", "rollout.startup_timeout_s=600", "optimizer.lr=1.0e-4"),
        f"trainer.max_parity_diff={MAX_PARITY_DIFF}",
    ),
)

SETUPS = {setup.engine: setup for setup in (FAKE, VLLM)}
