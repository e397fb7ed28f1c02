"""`python -m tests.injection.cut_off`: an actor is cut off from the network while it samples; what its fleet sees.

Two actors with the fake engine, each on a machine of its own; the learner's fleet and sampler in this process, with
every deadline as by default. Prints a line of JSON. Needs root, `ip` and `nsenter`.
"""

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import log
from common.types import ActorState, SamplingParams
from learner.rollouts.fleet import Fleet
from learner.rollouts.members import FleetEvent
from learner.rollouts.sampler import Sampler, build_request
from tests.helpers.fakes import make_sample, sample_all, until
from tests.injection.machines import Machine, Machines
from tests.manifests.runner import kernel

SLOTS = 4
# A group takes 0.3 s: one actor alone is at work for longer than the cut may go unnoticed.
NUM_GROUPS = 60
_SETTINGS = ("insecure=true", "fake.first_token_s=0.3", "fake.token_s=0")
_PORT = 50051


def main() -> None:
    """Say what was seen."""
    log.configure("warning")
    kernel.unshare(kernel.CLONE_NEWNET)
    names = ("victim", "other")
    with tempfile.TemporaryDirectory() as folder, Machines(names, Path(folder)) as machines:
        victim, other = (machines.by_name[name] for name in names)
        for machine in (victim, other):
            machine.start("actor", "--engine", "fake", "--standalone", "--listen", _address(machine), *_SETTINGS)
        print(json.dumps(asyncio.run(_cut_off(victim, other))))


async def _cut_off(victim: Machine, other: Machine) -> dict[str, Any]:
    fleet = Fleet([_address(victim), _address(other)], run_id=None, slots_per_actor=SLOTS)
    left_at: dict[str, float] = {}

    def note(event: FleetEvent) -> None:
        if event.kind == "left":
            left_at[event.address] = time.monotonic()

    fleet.subscribe(note)
    await fleet.start(startup_timeout_s=60, min_actors=2)
    await until(lambda: all(member.state is ActorState.SERVING for member in fleet.members()), 0.02)
    sampler = Sampler(fleet)
    requests = [build_request(f"g{i}", make_sample(i), SamplingParams(n=1, seed=i)) for i in range(NUM_GROUPS)]
    work = asyncio.ensure_future(sample_all(sampler, requests))
    await until(lambda: fleet.members()[0].in_flight == SLOTS, 0.002)
    cut_at = time.monotonic()
    victim.cut()
    groups = await work
    await until(lambda: left_at, 0.02)
    await fleet.close()
    return {
        "noticed_s": {address: at - cut_at for address, at in left_at.items()},
        "victim": _address(victim),
        "num_groups": len({group.prompt.group_id.partition(".")[0] for group in groups}),
        "sent_again": sampler.retries,
    }


def _address(machine: Machine) -> str:
    return f"{machine.address}:{_PORT}"


if __name__ == "__main__":
    main()
