"""`python -m benchmarks.event_loop_stall`: how long the actor's event loop stands still under full load with images.

Groups of 16 completions with an image of their own, more of them at once than vLLM runs; the figure is the metric
`outrider_actor_longest_stall_seconds` of the minute in which they ran. The ratio is the bound, 10 ms, over that.
Another process that wants the actor's core stalls the loop as well: the figure is one of an idle machine, or none.
"""

import argparse
import asyncio
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks import generation, harness
from benchmarks.serving import serving

GOAL = 1.0
BOUND_S = 0.010
GROUPS_AT_ONCE = 64
GROUP_SIZE = 16
MAX_TOKENS = 64
LOAD_S = 60.0  # what the metric looks back on


def main() -> None:
    """Load the actor, read the metric, print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.event_loop_stall")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from examples.digits.model import build_model
    from tests.launched import free_ports

    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as runner:
        folder = Path(name)
        model, port = build_model(folder / "model", seed=0), free_ports(1)
        settings = [f"vllm.{key}={value}" for key, value in generation.ENGINE.items()]
        arguments = ["--model", str(model), "--standalone", "--listen", "127.0.0.1:0"]
        arguments += [f"metrics_listen=127.0.0.1:{port}", *settings]
        with serving("actor", *arguments, log=folder / "actor.log") as address:
            harness.say("warming up")
            runner.run(_load(address, 10.0, 0))
            ratios = []
            for turn in range(1, options.rounds + 1):
                num_groups = runner.run(_load(address, LOAD_S, turn))
                stall_s = _longest_stall_s(port)
                harness.say(f"round {turn}: {num_groups} groups, longest stall {1e3 * stall_s:.1f} ms")
                ratios.append(BOUND_S / stall_s)
    harness.report("event_loop_stall", {"full_load": harness.Comparison(tuple(ratios), GOAL)})


async def _load(address: str, seconds: float, turn: int) -> int:
    """Keep the actor busy; how many groups it has finished."""
    from common.client import GrpcClient

    client = GrpcClient(address)
    end = time.monotonic() + seconds
    counts = await asyncio.gather(*(_ask(client, end, turn * GROUPS_AT_ONCE + i) for i in range(GROUPS_AT_ONCE)))
    await client.close()
    return sum(counts)


async def _ask(client: Any, end: float, caller: int) -> int:
    from common.types import SamplingParams
    from examples.digits import data
    from learner.rollouts.sampler import build_request
    from learner.types import PromptSample

    rows, _ = data.split()
    num_groups = 0
    while time.monotonic() < end:
        image = data.png(int(rows[(17 * caller + num_groups) % len(rows)]))
        sample = PromptSample(num_groups, data.messages(), (image,), "")
        sampling = SamplingParams(n=GROUP_SIZE, max_tokens=MAX_TOKENS, ignore_eos=True)
        await client.generate(build_request(f"{caller}-{num_groups}", sample, sampling), timeout_s=120)
        num_groups += 1
    return num_groups


def _longest_stall_s(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    [line] = [line for line in lines if line.startswith("outrider_actor_longest_stall_seconds ")]
    return float(line.split()[1])


if __name__ == "__main__":
    main()
