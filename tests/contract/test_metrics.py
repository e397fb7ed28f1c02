"""What Prometheus reads from an actor."""

import asyncio
import urllib.request

import pytest

from common.config import ConfigError
from common.media import content_hash
from common.pb.rollout.v1 import rollout_pb2 as pb
from tests.contract.conftest import StartActor, png
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
