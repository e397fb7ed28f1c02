"""Tokens/s through the gRPC actor against `vllm.LLM.generate` in the caller's own process.

What a turn is, on both sides: from PNG files in memory to the token ids of every completion, for the same checkpoint,
engine settings, images, prompts and lengths. Images are new in each turn, so that no cache helps. Beside each timed
turn of sampled groups both sides answer the same images greedily, untimed: those tokens must be equal.
"""

import argparse
import asyncio
import base64
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import say
from benchmarks.side import Process

GOALS = {"tokens_64": 0.95}
MAX_TOKENS = {"tokens_64": 64}
NUM_PROMPTS = 64
GROUP_SIZE = 8
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 512,
    "max_num_batched_tokens": 4096,
    "kv_cache_gib": 1,
    "max_images": 1,
}
# Of the greedy completions; where two tokens are equally likely, rounding in differently composed batches decides.
MIN_EQUAL_SHARE = 0.95


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
        side: list[str | Path] = [sys.executable, "-m", "benchmarks.inprocess_side", model, json.dumps(ENGINE)]
        with (
            running_actor(model, folder / "actor.log") as address,
            Process(side, folder / "inprocess.log") as peer,
            asyncio.Runner() as runner,
        ):
            ours = _OurSide(address, runner)
            comparisons = {case: _measure(case, ours, peer, pairs) for case in GOALS}
            ours.close()
    harness.report("actor_vs_inprocess", comparisons)


def _measure(case: str, ours: "_OurSide", peer: Process, pairs: int) -> harness.Comparison:
    tokens = NUM_PROMPTS * GROUP_SIZE * MAX_TOKENS[case]
    say(f"{case}: {NUM_PROMPTS} images x {GROUP_SIZE} completions of {MAX_TOKENS[case]} tokens a turn, {pairs} pairs")
    turns = {"ours": 0, "peer": 0}
    greedy = {"n": 1, "temperature": 0.0, "max_tokens": MAX_TOKENS[case], "ignore_eos": True}
    sampled = {"n": GROUP_SIZE, "max_tokens": MAX_TOKENS[case], "ignore_eos": True}
    greedy_tokens: dict[str, list[list[int]]] = {}

    def take(who: str) -> float:
        images = _images(turns[who])
        name = f"{case}-{turns[who]}"
        turns[who] += 1
        if who == "ours":
            seconds, token_ids = ours.generate(name, images, sampled)
            _, greedy_tokens[who] = ours.generate(name + "-greedy", images, greedy)
        else:
            seconds, token_ids = _generate_in_process(peer, images, sampled)
            _, greedy_tokens[who] = _generate_in_process(peer, images, greedy)
            _require_equal_tokens(greedy_tokens["ours"], greedy_tokens["peer"])
        lengths = [len(ids) for ids in token_ids]
        harness.require_equal("lengths", lengths, [MAX_TOKENS[case]] * NUM_PROMPTS * GROUP_SIZE)
        return tokens / seconds

    say("warming up")
    for _ in range(2):
        take("ours")
        take("peer")
    return harness.compare(
        case, lambda: take("ours"), lambda: take("peer"), pairs=pairs, goal=GOALS[case], unit="tokens/s"
    )


def _require_equal_tokens(ours: list[list[int]], peer: list[list[int]]) -> None:
    harness.require_equal("numbers of completions", len(ours), len(peer))
    harness.require_equal("lengths", [len(ids) for ids in ours], [len(ids) for ids in peer])
    equal = sum(mine == theirs for mine, theirs in zip(ours, peer, strict=True)) / len(ours)
    if equal < MIN_EQUAL_SHARE:
        raise harness.UnequalWorkError(f"only {equal:.1%} of the completions have the same tokens on both sides")


def _images(turn: int) -> list[bytes]:
    """PNG files that no other turn has."""
    from examples.digits import data

    rows, _ = data.split()
    return [data.png(int(rows[(turn * NUM_PROMPTS + index) % len(rows)])) for index in range(NUM_PROMPTS)]


def _generate_in_process(peer: Process, images: list[bytes], sampling: dict[str, Any]) -> tuple[float, list[list[int]]]:
    from examples.digits import data

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": data.QUESTION}]}]
    encoded = [base64.b64encode(image).decode() for image in images]
    answer = peer.ask({"images": encoded, "messages": messages, "sampling": sampling})
    return answer["seconds"], answer["token_ids"]


class _OurSide:
    """The learner's own client."""

    def __init__(self, address: str, runner: asyncio.Runner) -> None:
        from common.client import GrpcClient

        async def connect() -> GrpcClient:
            return GrpcClient(address)

        self._runner = runner
        self._client = runner.run(connect())

    def generate(self, name: str, images: list[bytes], sampling: dict[str, Any]) -> tuple[float, list[list[int]]]:
        """Seconds and the token ids of each completion, in the order of the images."""
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


@contextmanager
def running_actor(model: Path, log: Path) -> Iterator[str]:
    """A standalone actor process; its address once it serves."""
    command = [sys.executable, "-m", "actor", "--model", str(model), "--standalone", "--listen", "127.0.0.1:0"]
    command += [f"vllm.{name}={value}" for name, value in ENGINE.items()]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if " ready on " in line:
                yield line.split(" ready on ")[1].rsplit(": ", 1)[0]
                break
        else:
            raise RuntimeError(f"the actor ended with status {process.wait()}: {log.read_text()[-2000:]}")
    finally:
        process.terminate()
        process.wait(timeout=30)


if __name__ == "__main__":
    main()
