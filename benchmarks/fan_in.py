"""What one learner takes in from few and from many actors: trajectories/s, bytes/s and its resident memory.

The learner's own loop (`benchmarks/simulated.py`, training takes no time) over actors with the fake engine, 16 servers
in a process, each with a port and an identity of its own; every number of actors gets a learner process of its own.
Groups of 8 completions of 64 tokens with logprobs; their prompt names an image. Everything shares the cores of this
machine, so that many actors take some of the learner's time; its own CPU time for a trajectory tells its share.

Case `many_actors`: trajectories/s with the most actors against those with a quarter as many: the learner must not come
to do more work for a trajectory as its fleet grows.
"""

import argparse
import asyncio
import io
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.harness import say

CASE = "many_actors"
GOAL = 0.8
COUNTS = (1, 4, 16, 64, 256)
SERVERS_PER_PROCESS = 16
GROUP_SIZE, NUM_TOKENS, NUM_IMAGES = 8, 64, 8
BATCH, MAX_STALENESS, SLOTS_PER_ACTOR = 256, 4, 8
_NUM_STEPS, _WARM_UP = 14, 4
# A group takes 64 ms of an actor's time.
ENGINE = {"lengths": [NUM_TOKENS], "first_token_s": 0.001, "token_s": 0.001}


@dataclass(frozen=True, slots=True)
class Point:
    """One number of actors."""

    num_actors: int
    trajectories_per_s: float
    cpu_ms: float
    """CPU time of the learner for one trajectory."""
    resident_mib: float
    """The learner's largest resident memory."""


def main() -> None:
    """Measure each number of actors, and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fan_in", description=__doc__)
    parser.add_argument("--pairs", type=int, default=1, help="how often each number is measured")
    parser.add_argument("--actors", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--plot", type=Path, help="write the plot of docs/performance.md, an SVG file")
    parser.add_argument("--only", type=int, help="only measure so many actors, in this process")
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(asdict(_measure(options.only))))
        return
    group_bytes = asyncio.run(_group_bytes())
    say(f"a group of {GROUP_SIZE} x {NUM_TOKENS} tokens: {group_bytes:.0f} bytes on the wire")
    rounds = [[_in_a_process(number) for number in options.actors] for _ in range(options.pairs)]
    best = [max(points, key=lambda point: point.trajectories_per_s) for points in zip(*rounds, strict=True)]
    for point in best:
        mb_per_s = point.trajectories_per_s / GROUP_SIZE * group_bytes / 1e6
        say(
            f"{point.num_actors:4} actors: {point.trajectories_per_s:6.0f} trajectories/s, {mb_per_s:6.2f} MB/s, "
            f"{point.cpu_ms:.3f} ms of CPU each, {point.resident_mib:.0f} MiB"
        )
    if options.plot is not None:
        _plot(best, group_bytes, options.plot)
    if len(best) > 1:
        ratios = [points[-1].trajectories_per_s / points[-2].trajectories_per_s for points in rounds]
        harness.report("fan_in", {CASE: harness.Comparison(tuple(ratios), GOAL)})


def _in_a_process(num_actors: int) -> Point:
    command = [sys.executable, "-m", "benchmarks.fan_in", "--only", str(num_actors)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=True)
    point = Point(**json.loads(done.stdout.splitlines()[-1]))
    say(f"{num_actors} actors: {point.trajectories_per_s:.0f} trajectories/s")
    return point


def _measure(num_actors: int) -> Point:
    from benchmarks.side import Process
    from benchmarks.simulated import make_prompts, train

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        addresses: list[str] = []
        while len(addresses) < num_actors:
            num_servers = min(SERVERS_PER_PROCESS, num_actors - len(addresses))
            command = [sys.executable, "-m", "benchmarks.fan_in_side", str(num_servers), json.dumps(ENGINE)]
            log = folder / f"actors-{len(addresses)}.log"
            addresses += stack.enter_context(Process(command, log)).facts["addresses"]
        run = train(
            folder / "run",
            make_prompts(4096, _images()),
            step_s=0.0,
            rollout={
                "actors": addresses,
                "min_actors": num_actors,
                "n": GROUP_SIZE,
                "max_tokens": NUM_TOKENS,
                "slots_per_actor": SLOTS_PER_ACTOR,
            },
            trainer={"batch_prompts": BATCH, "total_steps": _NUM_STEPS, "max_staleness": MAX_STALENESS},
            weights={"timeout_s": 300.0},
        )
    first, last = run.steps[_WARM_UP - 1], run.steps[-1 - MAX_STALENESS]
    num_steps = _NUM_STEPS - MAX_STALENESS - _WARM_UP
    harness.require_equal("tokens", run.num_tokens, _NUM_STEPS * BATCH * GROUP_SIZE * NUM_TOKENS)
    num_trajectories = num_steps * BATCH * GROUP_SIZE
    return Point(
        num_actors,
        num_trajectories / (last["wall_s"] - first["wall_s"]),
        1e3 * (run.cpu_s[_WARM_UP + num_steps] - run.cpu_s[_WARM_UP]) / num_trajectories,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def _images() -> list[bytes]:
    from PIL import Image

    rng = np.random.default_rng(0)
    files = []
    for _ in range(NUM_IMAGES):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (56, 56, 3), np.uint8)).save(file, format="PNG")
        files.append(file.getvalue())
    return files


async def _group_bytes() -> float:
    """Bytes of a group on the wire, in both directions, once the actor has the image."""
    from benchmarks.counting_proxy import counting_proxy
    from benchmarks.serving import FAKE_ACTOR, serving
    from benchmarks.simulated import make_prompts
    from common.client import GrpcClient
    from common.types import SamplingParams
    from learner.rollouts.sampler import build_request

    num_groups = 32
    sample = make_prompts(1, _images())[0]
    sampling = SamplingParams(n=GROUP_SIZE, max_tokens=NUM_TOKENS, seed=0)
    settings = [f"fake.{name}={json.dumps(value)}" for name, value in ENGINE.items()]
    with tempfile.NamedTemporaryFile() as log, serving(*FAKE_ACTOR, *settings, log=Path(log.name)) as address:
        host, _, port = address.rpartition(":")
        async with counting_proxy(host, int(port)) as (proxied, counts):
            client = GrpcClient(proxied)
            await client.generate(build_request("first", sample, sampling), timeout_s=60)
            counts.take()
            for number in range(num_groups):
                await client.generate(build_request(f"g{number}", sample, sampling), timeout_s=60)
            await client.close()
            return counts.total / num_groups


def _plot(points: Sequence[Point], group_bytes: float, path: Path) -> None:
    """Three panels over the number of actors."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fan_in", "font.family": "sans-serif"})
    numbers = [point.num_actors for point in points]
    rates = [point.trajectories_per_s for point in points]
    panels = {
        "trajectories/s": rates,
        "MB/s": [rate / GROUP_SIZE * group_bytes / 1e6 for rate in rates],
        "learner, MiB resident": [point.resident_mib for point in points],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 2.6), layout="constrained")
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        axis.plot(numbers, values, marker="o")
        axis.set(title=title, xlabel="actors", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.set_xticks(numbers, labels=map(str, numbers))
        axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
