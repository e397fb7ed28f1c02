"""Tokens/s through the gRPC actor against `vllm.LLM.generate` in the caller's own process.

What a turn is: `benchmarks.generation`.
"""

import argparse
import asyncio
import base64
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import generation, harness
from benchmarks.harness import say
from benchmarks.side import Process

GOALS = {"tokens_8": 0.97, "tokens_64": 0.95, "tokens_128": 0.99}
MAX_TOKENS = {"tokens_8": 8, "tokens_64": 64, "tokens_128": 128}


def main() -> None:
    """Run every case and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.actor_vs_inprocess", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    pairs: int = parser.parse_args().pairs

    from common import torchvision_ops

    torchvision_ops.install()
    from examples.digits.model import build_model

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build_model(folder / "model", seed=0)
        say("starting the actor and the engine in its own process (about a minute)")
        side: list[str | Path] = [sys.executable, "-m", "benchmarks.inprocess_side", model]
        with (
            generation.actor(model, folder / "actor.log") as address,
            Process([*side, json.dumps(generation.ENGINE)], folder / "inprocess.log") as peer,
            asyncio.Runner() as runner,
        ):
            ours = generation.ActorSide(address, runner)

            def in_process(_name: str, images: list[bytes], sampling: dict[str, Any]) -> tuple[float, list[list[int]]]:
                return _generate_in_process(peer, images, sampling)

            comparisons = {
                case: generation.measure(case, MAX_TOKENS[case], ours.generate, in_process, pairs=pairs, goal=goal)
                for case, goal in GOALS.items()
            }
            ours.close()
    harness.report("actor_vs_inprocess", comparisons)


def _generate_in_process(peer: Process, images: list[bytes], sampling: dict[str, Any]) -> tuple[float, list[list[int]]]:
    from examples.digits import data

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": data.QUESTION}]}]
    encoded = [base64.b64encode(image).decode() for image in images]
    answer = peer.ask({"images": encoded, "messages": messages, "sampling": sampling})
    return answer["seconds"], answer["token_ids"]


if __name__ == "__main__":
    main()
