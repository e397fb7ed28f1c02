"""Tokens/s through the gRPC actor against vLLM's own OpenAI server over HTTP, with images in base64.

What a turn is: `benchmarks.generation`. Both give back the token ids and the logprob of each.
"""

import asyncio
import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import generation, harness, vllm_server

GOALS = {"tokens_8": 1.1, "tokens_128": 1.1}


@contextmanager
def over_http(model: Path, folder: Path, runner: asyncio.Runner) -> Iterator[generation.Generate]:
    """The server and a client of it."""
    with vllm_server.serve("http", model, folder / "http.log", {}) as address:
        side = HttpSide(f"http://{address}", str(model), runner)
        try:
            yield side.generate
        finally:
            side.close()


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
    generation.compare_actor("actor_vs_http", GOALS, over_http, __doc__)
