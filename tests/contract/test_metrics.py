"""What Prometheus reads from an actor."""

import asyncio
import time
import urllib.request

import pytest

from common.config import ConfigError
from common.media import content_hash
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.stalls import StallWatch
from tests.contract.conftest import StartActor, png
from tests.fakes import until
from tests.launched import free_ports


def scrape(port: int) -> dict[str, float]:
    """Samples by name and labels, as they stand in the text format."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


async def test_an_actor_counts_what_it_does(start_actor: StartActor) -> None:
    port = free_ports(1)
    actor = await start_actor(metrics_listen=f"127.0.0.1:{port}", fake={"token_s": 0.0})
    image = png()
    sampling = pb.SamplingParams(n=4, max_tokens=3, ignore_eos=True)
    for media in (
        pb.MediaItem(modality=pb.MODALITY_IMAGE, encoded=image),
        pb.MediaItem(modality=pb.MODALITY_IMAGE, sha256=content_hash(image)),
    ):
        message = pb.ChatMessage(role="user", parts=[pb.ChatPart(media_index=0)])
        chat = pb.ChatPrompt(messages=[message])
        request = pb.GenerateRequest(group_id="g", chat=chat, media=[media], sampling=sampling)
        assert [event async for event in actor.rollouts.Generate(request)]
    call = actor.rollouts.Generate(pb.GenerateRequest(group_id="g", text="x", sampling=pb.SamplingParams(n=10**6)))
    with pytest.raises(Exception, match=r"sampling\.n"):
        await call.read()
    samples = await asyncio.to_thread(scrape, port)
    expected = {
        'state{state="serving"}': 1,
        'state{state="draining"}': 0,
        "policy_version": 0,
        "running_completions": 0,
        'groups_total{outcome="finished"}': 2,
        'groups_total{outcome="refused"}': 1,
        'completions_total{finish_reason="length"}': 8,
        "tokens_total": 24,
        "first_token_seconds_count": 8,
        "token_seconds_count": 8,
        'media_total{source="sent"}': 1,
        'media_total{source="stored"}': 1,
        "pause_seconds_count": 0,
    }
    assert {name: samples[f"outrider_actor_{name}"] for name in expected} == expected


async def test_a_taken_port_is_one_line(start_actor: StartActor) -> None:
    port = free_ports(1)
    await start_actor(metrics_listen=f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match=f"metrics_listen: 127.0.0.1:{port}: Address already in use"):
        await start_actor(metrics_listen=f"127.0.0.1:{port}")


async def test_what_has_a_time_is_timed(start_actor: StartActor) -> None:
    """Against the fake engine's own times: 4 tokens, 0.1 s to the first and 0.05 s to each further one."""
    port = free_ports(1)
    fake = {"first_token_s": 0.1, "token_s": 0.05, "max_num_seqs": 1}
    actor = await start_actor(metrics_listen=f"127.0.0.1:{port}", fake=fake)
    sampling = pb.SamplingParams(n=3, max_tokens=4, ignore_eos=True)
    call = actor.rollouts.Generate(pb.GenerateRequest(group_id="g", text="x", sampling=sampling))
    assert (await call.read()).HasField("prompt")
    await until(lambda: actor.engine.load().num_running == 1)
    during = await asyncio.to_thread(scrape, port)
    assert (during["outrider_actor_running_completions"], during["outrider_actor_waiting_completions"]) == (1, 2)
    assert [event async for event in call]
    after = await asyncio.to_thread(scrape, port)
    # One after the other: the second and the third wait for those before them.
    assert after["outrider_actor_first_token_seconds_sum"] >= 0.1 + 0.35 + 0.6
    assert after["outrider_actor_token_seconds_count"] == 3
    assert after["outrider_actor_token_seconds_sum"] / 3 >= 0.05
    assert after["outrider_actor_completion_seconds_sum"] >= 0.25 + 0.5 + 0.75


async def test_a_stall_of_the_loop_shows(start_actor: StartActor) -> None:
    port = free_ports(1)
    actor = await start_actor(metrics_listen=f"127.0.0.1:{port}")
    await asyncio.sleep(0)  # the watch begins
    await asyncio.sleep(0)
    time.sleep(0.5)  # noqa: ASYNC251 - a handler that computes
    await until(lambda: actor.server.metrics.stalls.longest_s() > 0.4)
    assert (await asyncio.to_thread(scrape, port))["outrider_actor_longest_stall_seconds"] > 0.4


def test_stalls_are_of_the_last_minute() -> None:
    watch = StallWatch()
    assert watch.longest_s() == 0
    for now_s, late_s in ((0.2, 0.01), (0.9, 0.3), (30.0, 0.2), (59.9, 0.001)):
        watch.add(now_s, late_s)
    assert watch.longest_s() == 0.3
    watch.add(60.0, 0.002)
    assert watch.longest_s() == 0.2
    watch.add(1000.0, 0.0)
    assert watch.longest_s() == 0
