"""Tokens/s through the gRPC actor against `vllm.LLM.generate` in the caller's own process.

Prompts, images, scheduling and the model in one process, as trainers that share their process with vLLM have it. What
a turn is: `benchmarks.generation`.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import generation
from benchmarks.llm_side import LlmSide

GOALS = {"tokens_8": 0.97, "tokens_64": 0.95, "tokens_128": 0.99}


@contextmanager
def in_process(model: Path, folder: Path, _runner: asyncio.Runner) -> Iterator[generation.Generate]:
    """vLLM on CPUs takes a second process for the model unless both are said."""
    settings = generation.ENGINE | {"distributed_executor_backend": "uni"}
    with LlmSide(model, settings, folder / "llm.log", {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}) as side:
        yield side.generate


if __name__ == "__main__":
    generation.compare_actor("actor_vs_inprocess", GOALS, in_process, __doc__)
