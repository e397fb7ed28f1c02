"""Tokens/s through the gRPC actor against vLLM's own OpenAI server over HTTP, with images in base64.

What a turn is: `benchmarks.generation`. Both give back the token ids and the logprob of each.
"""

import argparse
import asyncio
import base64
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import generation, harness, vllm_server
from benchmarks.harness import say

GOALS = {"tokens_8": 1.1, "tokens_128": 1.1}
MAX_TOKENS = {"tokens_8": 8, "tokens_128": 128}


def main() -> None:
    """Run every case and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.actor_vs_http", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    pairs: int = parser.parse_args().pairs

    from common import torchvision_ops

    torchvision_ops.install()
    from examples.digits.model import build_model

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build_model(folder / "model", seed=0)
        say("starting the actor and vLLM's server (about two minutes)")
        with (
            generation.actor(model, folder / "actor.log") as address,
            vllm_server.serve("http", model, folder / "http.log", {}) as url,
            asyncio.Runner() as runner,
        ):
            ours = generation.ActorSide(address, runner)
            peer = HttpSide(f"http://{url}", str(model), runner)
            comparisons = {
                case: generation.measure(case, MAX_TOKENS[case], ours.generate, peer.generate, pairs=pairs, goal=goal)
                for case, goal in GOALS.items()
            }
            ours.close()
            peer.close()
    harness.report("actor_vs_http", comparisons)


class HttpSide:
    """A client of OpenAI's API with one connection for each request under way."""

    def __init__(self, url: str, model: str, runner: asyncio.Runner) -> None:
        async def connect() -> aiohttp.ClientSession:
            return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0))

        self._model = model
        self._runner = runner
        self._session = runner.run(connect())

    def generate(self, _name: str, images: list[bytes], sampling: dict[str, Any]) -> tuple[float, list[list[int]]]:
        """See `generation.Generate`."""
        from examples.digits import data

        async def ask(image: bytes) -> list[list[int]]:
            url = "data:image/png;base64," + base64.b64encode(image).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": data.QUESTION}]
            body = {
                "model": self._model,
                "messages": [{"role": "user", "content": content}],
                "logprobs": True,
                "return_token_ids": True,
                **sampling,
            }
            async with self._session.post("/v1/chat/completions", json=body) as response:
                answer = await response.json()
                if response.status != 200:
                    raise RuntimeError(f"the server answers {response.status}: {answer}")
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            for choice in choices:
                harness.require_equal(
                    "numbers of logprobs", len(choice["logprobs"]["content"]), len(choice["token_ids"])
                )
            return [choice["token_ids"] for choice in choices]

        async def ask_all() -> tuple[float, list[list[int]]]:
            started_at = time.perf_counter()
            groups = await asyncio.gather(*map(ask, images))
            return time.perf_counter() - started_at, [ids for group in groups for ids in group]

        return self._runner.run(ask_all())

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._session.close())


if __name__ == "__main__":
    main()
