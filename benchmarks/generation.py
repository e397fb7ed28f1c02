"""What the benchmarks of generation share: the work of a turn, the actor, and its client.

A turn, on every side, goes from PNG files in memory to the token ids and logprobs of every completion, for the same
checkpoint, engine settings, images, prompts and lengths. Images are new in each turn, so that no cache helps. Beside
each timed turn of sampled groups every side answers the same images greedily, untimed: those tokens must be equal.
"""

import argparse
import asyncio
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from benchmarks import harness
from benchmarks.harness import say
from benchmarks.serving import vllm_actor

NUM_PROMPTS = 64
GROUP_SIZE = 8
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 512,
    "max_num_batched_tokens": 4096,
    "block_size": 32,
    "kv_cache_gib": 1,
    "max_images": 1,
}
# Of the greedy completions; where two tokens are equally likely, rounding in differently composed batches decides.
MIN_EQUAL_SHARE = 0.95

Generate = Callable[[str, list[bytes], dict[str, Any]], tuple[float, list[list[int]]]]
"""(name of the turn, images, sampling parameters) to (seconds, token ids of each completion in the images' order)."""


Peer = Callable[[Path, Path, asyncio.Runner], AbstractContextManager[Generate]]
"""(checkpoint, folder for logs, where coroutines run) to the peer's side, running."""


def compare_actor(name: str, goals: Mapping[str, float], peer: Peer, about: str | None) -> None:
    """Run the actor against a peer and print the JSON line; case "tokens_8" has completions of 8 tokens."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=[*goals], default=[*goals])
    options = parser.parse_args()

    from common import torchvision_ops

    torchvision_ops.install()
    from examples.digits.model import build_model

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build_model(folder / "model", seed=0)
        say("starting the actor and the peer (one or two minutes)")
        with vllm_actor(model, folder / "actor.log", ENGINE) as address, asyncio.Runner() as runner:
            of_actor = set(psutil.Process().children(recursive=True))
            with peer(model, folder, runner) as theirs:
                of_peer = set(psutil.Process().children(recursive=True)) - of_actor
                side = ActorSide(address, runner)
                turns = {"ours": itertools.count(), "peer": itertools.count()}

                def ours(*turn: Any) -> tuple[float, list[list[int]]]:
                    with harness.stopped(of_peer):
                        return side.generate(*turn)

                comparisons = {
                    case: _measure(
                        case, int(case.partition("_")[2]), ours, theirs, turns, pairs=options.pairs, goal=goals[case]
                    )
                    for case in options.cases
                }
                side.close()
    harness.report(name, comparisons)


def _measure(
    case: str,
    max_tokens: int,
    ours: Generate,
    peer: Generate,
    turns: Mapping[str, Iterator[int]],
    *,
    pairs: int,
    goal: float,
) -> harness.Comparison:
    """Of tokens/s. `turns` number those of each side through all cases, so that no cache knows an image."""
    say(f"{case}: {NUM_PROMPTS} images x {GROUP_SIZE} completions of {max_tokens} tokens a turn, {pairs} pairs")
    greedy = {"n": 1, "temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
    sampled = {"n": GROUP_SIZE, "max_tokens": max_tokens, "ignore_eos": True}
    latest: dict[str, list[list[int]]] = {}

    def take(who: str, generate: Generate) -> float:
        turn = next(turns[who])
        images = images_of(turn)
        name = f"{case}-{turn}"
        seconds, token_ids = generate(name, images, sampled)
        lengths = [len(ids) for ids in token_ids]
        harness.require_equal("lengths", lengths, [max_tokens] * NUM_PROMPTS * GROUP_SIZE)
        _, latest[who] = generate(f"{name}-greedy", images, greedy)
        if who == "peer":
            _require_equal_tokens(latest["ours"], latest["peer"])
        return sum(lengths) / seconds

    say("warming up")
    for _ in range(2):
        take("ours", ours)
        take("peer", peer)
    return harness.compare(
        case, lambda: take("ours", ours), lambda: take("peer", peer), pairs=pairs, goal=goal, unit="tokens/s"
    )


def _require_equal_tokens(ours: list[list[int]], peer: list[list[int]]) -> None:
    harness.require_equal("numbers of completions", len(ours), len(peer))
    harness.require_equal("lengths", [len(ids) for ids in ours], [len(ids) for ids in peer])
    equal = sum(mine == theirs for mine, theirs in zip(ours, peer, strict=True)) / len(ours)
    if equal < MIN_EQUAL_SHARE:
        raise harness.UnequalWorkError(f"only {equal:.1%} of the completions have the same tokens on both sides")


def images_of(turn: int) -> list[bytes]:
    """PNG files that no other turn has: the digits again and again, each time with another pixel in the corner."""
    from examples.digits import data

    rows, _ = data.split()
    images = []
    for index in range(turn * NUM_PROMPTS, (turn + 1) * NUM_PROMPTS):
        image = Image.open(io.BytesIO(data.png(int(rows[index % len(rows)])))).convert("RGB")
        image.putpixel((0, 0), (index // len(rows), 0, 0))
        file = io.BytesIO()
        image.save(file, "PNG")
        images.append(file.getvalue())
    return images


class ActorSide:
    """The learner's own client of an actor."""

    def __init__(self, address: str, runner: asyncio.Runner) -> None:
        from common.client import GrpcClient

        async def connect() -> GrpcClient:
            return GrpcClient(address)

        self._runner = runner
        self._client = runner.run(connect())

    def generate(self, name: str, images: list[bytes], sampling: dict[str, Any]) -> tuple[float, list[list[int]]]:
        """See `Generate`."""
        from common.types import SamplingParams
        from examples.digits import data
        from learner.rollouts.sampler import build_request
        from learner.types import PromptSample

        async def sample() -> tuple[float, list[list[int]]]:
            started_at = time.perf_counter()
            requests = [
                build_request(
                    f"{name}-{row}",
                    PromptSample(row=row, messages=data.messages(), images=(image,), ground_truth=""),
                    SamplingParams(**sampling),
                )
                for row, image in enumerate(images)
            ]
            groups = await asyncio.gather(*(self._client.generate(request, timeout_s=120) for request in requests))
            token_ids = [completion.token_ids.tolist() for group in groups for completion in group.completions]
            return time.perf_counter() - started_at, token_ids

        return self._runner.run(sample())

    def close(self) -> None:
        """Close the connection."""
        self._runner.run(self._client.close())
