"""What Prometheus reads from an actor."""

import asyncio
import time
from typing import Any

import pytest

from common.config import ConfigError
from common.media import content_hash
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.process.stalls import Longest
from tests.helpers.fake_actors import StartActor, png
from tests.helpers.fakes import until
from tests.helpers.launched import free_ports
from tests.helpers.scrape import scrape


async def test_an_actor_counts_what_it_does(start_actor: StartActor) -> None:
    port = free_ports(1)
    actor = await start_actor(metrics_listen=f"127.0.0.1:{port}", fake={"token_s": 0.0})
    image = png()
    sampling = pb.SamplingParams(n=4, max_tokens=3, ignore_eos=True)

    def ask(item: pb.MediaItem) -> Any:
        chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", parts=[pb.ChatPart(media_index=0)])])
        return actor.rollouts.Generate(pb.GenerateRequest(group_id="g", chat=chat, media=[item], sampling=sampling))

    for media in (
        pb.MediaItem(modality=pb.MODALITY_IMAGE, encoded=image),
        pb.MediaItem(modality=pb.MODALITY_IMAGE, sha256=content_hash(image)),
    ):
        assert [event async for event in ask(media)]
    with pytest.raises(Exception, match="not stored here"):
        await ask(pb.MediaItem(modality=pb.MODALITY_IMAGE, sha256=bytes(32))).read()
    call = actor.rollouts.Generate(pb.GenerateRequest(group_id="g", text="x", sampling=pb.SamplingParams(n=10**6)))
    with pytest.raises(Exception, match=r"sampling\.n"):
        await call.read()
    call = actor.rollouts.Generate(pb.GenerateRequest(group_id="g", text="x", model="nobody", sampling=sampling))
    with pytest.raises(Exception, match="nobody"):  # the engine refuses it
        await call.read()
    samples = await asyncio.to_thread(scrape, port)
    expected = {
        'state{state="serving"}': 1,
        'state{state="draining"}': 0,
        "policy_version": 0,
        "running_completions": 0,
        'groups_total{outcome="finished"}': 2,
        'groups_total{outcome="refused"}': 3,
        'completions_total{finish_reason="length"}': 8,
        "tokens_total": 24,
        "first_token_seconds_count": 8,
        "token_seconds_count": 8,
        'media_total{source="sent"}': 1,
        'media_total{source="stored"}': 1,
        'media_total{source="missing"}': 1,
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


@pytest.mark.parametrize("computes", [True, False])
async def test_a_stall_of_the_loop_shows(start_actor: StartActor, computes: bool) -> None:
    """And whose fault it is: the loop's own thread computes, or it does not come to that."""
    port = free_ports(1)
    actor = await start_actor(metrics_listen=f"127.0.0.1:{port}")
    stalls = actor.server.metrics.stalls
    await until(stalls.stalled._by_second.copy)  # the watch has begun
    if computes:
        end_s = time.thread_time() + 0.5
        while time.thread_time() < end_s:
            pass
    else:
        time.sleep(0.5)  # noqa: ASYNC251 - as when another process has the core
    await until(lambda: stalls.stalled.value_s() > 0.4)
    samples = await asyncio.to_thread(scrape, port)
    assert samples["outrider_actor_longest_stall_seconds"] > 0.4
    assert (samples["outrider_actor_longest_busy_seconds"] > 0.4) is computes


def test_the_longest_is_of_the_last_minute() -> None:
    longest = Longest()
    assert longest.value_s() == 0
    for now_s, time_s in ((0.2, 0.01), (0.9, 0.3), (30.0, 0.2), (59.9, 0.001)):
        longest.add(now_s, time_s)
    assert longest.value_s() == 0.3
    longest.add(60.0, 0.002)
    assert longest.value_s() == 0.2
    longest.add(1000.0, 0.0)
    assert longest.value_s() == 0
