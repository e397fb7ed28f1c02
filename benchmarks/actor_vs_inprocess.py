"""Tokens/s through the gRPC actor against `vllm.LLM.generate` in the caller's own process.

What a turn is: `benchmarks.generation`.
"""

import asyncio
import base64
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import generation
from benchmarks.side import Process

GOALS = {"tokens_8": 0.97, "tokens_64": 0.95, "tokens_128": 0.99}


@contextmanager
def in_process(model: Path, folder: Path, _runner: asyncio.Runner) -> Iterator[generation.Generate]:
    """The engine in a process that does nothing else."""
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.inprocess_side", model]
    command.append(json.dumps(generation.ENGINE))
    with Process(command, folder / "inprocess.log") as process:

        def generate(_name: str, images: list[bytes], sampling: dict[str, Any]) -> tuple[float, list[list[int]]]:
            from examples.digits import data

            messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": data.QUESTION}]}]
            encoded = [base64.b64encode(image).decode() for image in images]
            answer = process.ask({"images": encoded, "messages": messages, "sampling": sampling})
            return answer["seconds"], answer["token_ids"]

        yield generate


if __name__ == "__main__":
    generation.compare_actor("actor_vs_inprocess", GOALS, in_process, __doc__)
