"""Real actor processes (fake engine), one of which is killed, stopped or cut off while it generates."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from common.errors import Unreachable
from common.rpc.options import KEEPALIVE_TIME_S, KEEPALIVE_TIMEOUT_S
from common.types import ActorState, SamplingParams
from learner.rollouts.fleet import Fleet
from learner.rollouts.members import FleetEvent
from learner.rollouts.sampler import Sampler, build_request
from tests.helpers.actor_processes import actor, free_address
from tests.helpers.fakes import make_sample, sample_all, until
from tests.helpers.launched import ROOT
from tests.injection.cut_off import NUM_GROUPS as NUM_GROUPS_OF_CUT
from tests.injection.cut_off import SLOTS
from tests.injection.machines import is_permitted

NUM_GROUPS = 60
N = 4
# Completions take some hundred milliseconds.
PACE = ("fake.first_token_s=0.1", "fake.token_s=0.01")
# For a machine whose cores are all busy.
MARGIN_S = 10.0


async def test_sigkill_in_mid_group_and_back_again() -> None:
    addresses = [free_address(), free_address()]
    fleet = Fleet(addresses, run_id=None, slots_per_actor=4, poll_s=0.05)
    events: list[FleetEvent] = []
    fleet.subscribe(events.append)
    sampler = Sampler(fleet)
    requests = [build_request(f"g{i}", make_sample(i), SamplingParams(n=N, seed=i)) for i in range(NUM_GROUPS)]
    async with actor(addresses[0], *PACE), actor(addresses[1], *PACE) as victim:
        await fleet.start(startup_timeout_s=30, min_actors=2)
        await until(lambda: all(member.state is ActorState.SERVING for member in fleet.members()), pause_s=0.02)
        ids = [member.actor_id for member in fleet.members()]
        work = asyncio.ensure_future(sample_all(sampler, requests))
        await until(lambda: fleet.members()[1].in_flight == 4, pause_s=0.002)
        victim.send_signal(signal.SIGKILL)
        await victim.wait()
        results = await work

        assert sampler.retries["UNREACHABLE"] >= 4
        assert [event.address for event in events if event.kind == "left"] == [addresses[1]]
        trajectories = {c.trajectory_id for group in results for c in group.completions}
        assert len(trajectories) == NUM_GROUPS * N
        for i, group in enumerate(results):
            assert group.prompt.group_id.startswith(f"g{i}.")
            assert {c.trajectory_id.rpartition("/")[2] for c in group.completions} == {group.prompt.actor_id}
        assert {group.prompt.actor_id for group in results[-8:]} == {ids[0]}

        async with actor(addresses[1], *PACE):
            await until(lambda: fleet.members()[1].state is ActorState.SERVING, pause_s=0.02)
            again = await sample_all(sampler, requests)
            used = {group.prompt.actor_id for group in again}
            assert used == {ids[0], fleet.members()[1].actor_id}
            assert ids[1] not in used
            # Seeded tokens do not depend on who sampled them, nor on how often it was tried.
            for first, second in zip(results, again, strict=True):
                for a, b in zip(first.completions, second.completions, strict=True):
                    assert np.array_equal(a.token_ids, b.token_ids)
        await fleet.close()


async def test_a_stopped_actor_is_noticed_by_keepalive_in_five_seconds() -> None:
    notice_s = KEEPALIVE_TIME_S + KEEPALIVE_TIMEOUT_S
    assert notice_s <= 5
    address = free_address()
    async with actor(address) as process:
        fleet = Fleet([address], run_id=None)
        await fleet.start(startup_timeout_s=60)
        process.send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        with pytest.raises(Unreachable):
            await fleet.members()[0].client.status(timeout_s=50)
        assert time.monotonic() - stopped_at < notice_s + MARGIN_S
        await fleet.close()


@pytest.mark.alone
@pytest.mark.skipif(not (is_permitted() or os.environ.get("CI")), reason="network namespaces need root and `ip`")
def test_a_cut_is_noticed_in_five_seconds() -> None:
    """By nothing but silence: no packet says that the other end is gone."""
    command = [sys.executable, "-m", "tests.injection.cut_off"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert [*seen["noticed_s"]] == [seen["victim"]]
    assert 1 < seen["noticed_s"][seen["victim"]] < 5
    assert (seen["num_groups"], seen["sent_again"]) == (NUM_GROUPS_OF_CUT, {"UNREACHABLE": SLOTS})
