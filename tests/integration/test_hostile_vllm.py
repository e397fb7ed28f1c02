"""An actor process with vLLM: what `tests/contract` proves with the fake engine, of the real one."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.client import GrpcClient
from common.rpc.channel import open_channel
from common.types import ActorState, Constraint, SamplingParams, StructuredOutput
from examples.digits.model import build_model
from tests.audit.everything import every_request, use_everything
from tests.audit.watch import WatchedActor, watched_actor
from tests.helpers.groups import image_bytes
from tests.hostile.calls import send
from tests.hostile.requests import KINDS, bad_calls
from tests.integration.live_actor import CONFIG, Trained, snapshot

# Two of each kind of bad call.
NUM_CALLS = 2 * len(KINDS)
VOCAB_SIZE = 320
REQUESTS = every_request((image_bytes(1), image_bytes(2)))
REQUEST = replace(REQUESTS[0], sampling=SamplingParams(n=4, max_tokens=8, seed=7))
STRUCTURES = (
    StructuredOutput(Constraint.REGEX, "(ab|c){2,4}"),
    StructuredOutput(Constraint.CHOICE, choices=("red", "green")),
    StructuredOutput(Constraint.JSON_SCHEMA, '{"type": "boolean"}'),
)
STRUCTURED = [replace(REQUEST, sampling=SamplingParams(max_tokens=8, structured_output=each)) for each in STRUCTURES]
LIMITS = ("limits.max_media_pixels=524288", "limits.max_media_bytes=1048576", "limits.max_message_bytes=4194304")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="module")
def actor(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedActor]:
    values = CONFIG.model_dump(exclude_unset=True) | {"max_videos": 1, "max_lora_rank": 4}
    arguments = ("--model", str(model_dir), *(f"vllm.{name}={value}" for name, value in values.items()), *LIMITS)
    with watched_actor(tmp_path_factory.mktemp("actor"), *arguments) as watched:
        yield watched


async def test_nothing_is_unpickled_while_vllm_serves(actor: WatchedActor, model_dir: Path) -> None:
    """Neither in the process with the socket nor in the engine's; that one begins with a pickle, so that is seen."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(model_dir)
    first = snapshot(model, 1)
    with torch.no_grad():
        next(model.parameters())[0] += 1e-3
    adapter = Trained(model_dir, seed=1).snapshot(3).update(full=False)
    await use_everything(actor.address, (*REQUESTS, *STRUCTURED), (first, snapshot(model, 2)), adapter)
    assert actor.unpickled() == []
    loading = {entry["pid"] for entry in actor.unpickled(while_loading=True)}
    assert loading
    assert actor.pid not in loading


async def test_bad_requests(actor: WatchedActor) -> None:
    client, channel = GrpcClient(actor.address), open_channel(actor.address)
    try:
        expected = await client.generate(REQUEST, timeout_s=60)
        limits = (await client.server_info()).limits
        for call in itertools.islice(bad_calls(2, limits, VOCAB_SIZE), NUM_CALLS):
            error = await send(channel, call, timeout_s=60)
            assert call.is_answered_by(error), (call.kind, repr(error))
        after = await client.generate(REQUEST, timeout_s=60)
        for before, now in zip(expected.completions, after.completions, strict=True):
            assert now.token_ids.tolist() == before.token_ids.tolist()
        status = await client.status()
        assert (status.state, status.num_running) == (ActorState.SERVING, 0)
    finally:
        await channel.close()
        await client.close()
