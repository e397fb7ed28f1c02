"""How long generation stands still for an update, while the actor generates.

Case `memory_copy`: as bytes/s, against a copy of the same bytes from memory to memory. Case `link_1gbit`: as updates/s,
against standing still for the whole update, from its first byte to the last actor that serves it, over a link of
1 Gb/s. That case needs network namespaces, and is left out where they are not permitted.
"""

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness, link
from benchmarks.update_world import World

GOALS = {"memory_copy": 1 / 3, "link_1gbit": 10.0}


def main() -> None:
    """Run the cases and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update_pause", description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--behind-link", action="store_true", help="only measure, for the second case")
    options = parser.parse_args()
    if options.behind_link:
        with _turns(3) as turns:
            print(json.dumps({"pauses_s": [times.pause_s for times, _ in turns], "updates_s": _whole(turns)}))
        return
    with _turns(options.pairs) as turns:
        pauses, copies = [1 / times.pause_s for times, _ in turns], [1 / copy_s for _, copy_s in turns]
    comparisons = {
        "memory_copy": harness.compare_measured(
            "memory_copy", pauses, copies, goal=GOALS["memory_copy"], unit="in a second"
        )
    }
    if answer := link.run_behind("1gbit", "benchmarks.update_pause", ["--behind-link"]):
        pauses, updates = ([1 / seconds for seconds in answer[name]] for name in ("pauses_s", "updates_s"))
        comparisons["link_1gbit"] = harness.compare_measured(
            "link_1gbit", pauses, updates, goal=GOALS["link_1gbit"], unit="in a second"
        )
    harness.report("update_pause", comparisons)


@contextlib.contextmanager
def _turns(num_pairs: int) -> Iterator[list[tuple[Any, float]]]:
    """Of each turn the `UpdateTimes`, and the seconds of a copy of the same bytes right after it."""
    import torch

    with tempfile.TemporaryDirectory() as temporary, World(Path(temporary), 1) as world:
        memory = torch.ones(world.num_bytes, dtype=torch.uint8)
        turns = []
        for turn in range(num_pairs):
            _, times = world.run(_while_generating(world, turn))
            started_at = time.perf_counter()
            offset = 0
            for buffer in world.snapshot.trained.buffers:
                memory[offset : offset + buffer.numel()].copy_(buffer)
                offset += buffer.numel()
            turns.append((times, time.perf_counter() - started_at))
        yield turns


async def _while_generating(world: World, turn: int) -> Any:
    from common.types import RolloutRequest, SamplingParams, TextPrompt

    sampling = SamplingParams(n=4, max_tokens=1500, ignore_eos=True)
    request = RolloutRequest(f"turn-{turn}", TextPrompt("What is it?"), sampling=sampling)
    group = asyncio.ensure_future(world.client.generate(request, timeout_s=120))
    while not (await world.client.status()).num_running:  # noqa: ASYNC110 - nothing tells when it runs
        await asyncio.sleep(0.01)
    try:
        outcome = await world.next_update()
        if group.done():
            raise harness.UnequalWorkError("nothing was generated any more when the update came")
        return outcome
    finally:
        group.cancel()
        await asyncio.gather(group, return_exceptions=True)


def _whole(turns: list[tuple[Any, float]]) -> list[float]:
    return [times.stage_s + times.pause_s for times, _ in turns]


if __name__ == "__main__":
    main()
