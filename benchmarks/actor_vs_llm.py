"""Tokens/s through the gRPC actor against `vllm.LLM.generate` as vLLM sets it up on CPUs.

Prompts and images in the caller's process, scheduling in a second and the model in a third. What a turn is:
`benchmarks.generation`.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import generation
from benchmarks.llm_side import LlmSide

GOALS = {"tokens_8": 0.97, "tokens_128": 0.99}


@contextmanager
def by_default(model: Path, folder: Path, _runner: asyncio.Runner) -> Iterator[generation.Generate]:
    """Nothing is said about processes."""
    with LlmSide(model, generation.ENGINE, folder / "llm.log") as side:
        yield side.generate


if __name__ == "__main__":
    generation.compare_actor("actor_vs_llm", GOALS, by_default, __doc__)
