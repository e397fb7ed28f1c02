"""`python -m benchmarks.event_loop_stall`: how long the actor's event loop stands still under full load with images.

Groups of 16 completions with an image of their own, more of them at once than vLLM runs. Of eight, one has an image of
a MiB, uploaded in chunks, and one has completions that must match a regular expression. The figures are two metrics of
the minute in which they ran, each as the bound, 10 ms, over it: `stalled`, how long the loop did not turn, and `busy`,
how long its thread computed meanwhile. The engine has one core, so that it leaves the others to the loop, as it does
where a GPU generates; this benchmark's own client, which would be another machine, shares that core with it. Whoever
else wants the others stalls the loop as well.
"""

import argparse
import asyncio
import os
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks import generation, harness
from benchmarks.serving import vllm_actor

GOAL = 1.0
BOUND_S = 0.010
GROUPS_AT_ONCE = 64
GROUP_SIZE = 16
MAX_TOKENS = 64
# What every eighth group of a caller is, and every eighth with another remainder.
KINDS = 8
LARGE, STRUCTURED = 3, 7
LOAD_S = 60.0  # what the metrics look back on
METRICS = {"stalled": "outrider_actor_longest_stall_seconds", "busy": "outrider_actor_longest_busy_seconds"}


def main() -> None:
    """Load the actor, read the metric, print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.event_loop_stall")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from examples.digits.model import build_model
    from tests.helpers.launched import free_ports

    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as runner:
        folder = Path(name)
        model, port = build_model(folder / "model", seed=0), free_ports(1)
        core = min(os.sched_getaffinity(0))
        listen = f"metrics_listen=127.0.0.1:{port}"
        with vllm_actor(
            model, folder / "actor.log", {**generation.ENGINE, "cpu_cores": repr(str(core))}, listen
        ) as address:
            os.sched_setaffinity(0, {core})
            harness.say("warming up")
            runner.run(_load(address, 10.0, 0))
            ratios: dict[str, list[float]] = {case: [] for case in METRICS}
            for turn in range(1, options.rounds + 1):
                num_groups = runner.run(_load(address, LOAD_S, turn))
                for case, metric in METRICS.items():
                    seconds = _read(port, metric)
                    harness.say(f"round {turn}, {num_groups} groups: {metric} {seconds:.4f}")
                    ratios[case].append(BOUND_S / seconds)
    harness.report("event_loop_stall", {case: harness.Comparison(tuple(found), GOAL) for case, found in ratios.items()})


async def _load(address: str, seconds: float, turn: int) -> int:
    """Keep the actor busy; how many groups it has finished."""
    from common.client import GrpcClient

    client = GrpcClient(address)
    end = time.monotonic() + seconds
    counts = await asyncio.gather(*(_ask(client, end, turn * GROUPS_AT_ONCE + i) for i in range(GROUPS_AT_ONCE)))
    await client.close()
    return sum(counts)


async def _ask(client: Any, end: float, caller: int) -> int:
    from benchmarks.group_bytes import noise_png
    from common.types import Constraint, SamplingParams, StructuredOutput
    from examples.digits import data
    from learner.rollouts.sampler import build_request
    from learner.types import PromptSample

    rows, _ = data.split()
    num_groups = 0
    letters = StructuredOutput(Constraint.REGEX, f"[a-z]{{{MAX_TOKENS}}}")
    while time.monotonic() < end:
        kind = (caller + num_groups) % KINDS
        if kind == LARGE:
            image = noise_png(2**16 * caller + num_groups)
        else:
            image = data.png(int(rows[(17 * caller + num_groups) % len(rows)]))
        sample = PromptSample(num_groups, data.messages(), (image,), "")
        structure = letters if kind == STRUCTURED else None
        sampling = SamplingParams(n=GROUP_SIZE, max_tokens=MAX_TOKENS, ignore_eos=True, structured_output=structure)
        await client.generate(build_request(f"{caller}-{num_groups}", sample, sampling), timeout_s=120)
        num_groups += 1
    return num_groups


def _read(port: int, metric: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    [line] = [line for line in lines if line.startswith(f"{metric} ")]
    return float(line.split()[1])


if __name__ == "__main__":
    main()
