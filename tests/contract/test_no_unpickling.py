"""Nothing is unpickled in a process that serves; and if something were, this would show."""

from pathlib import Path

import pytest
import torch

from common.media import content_hash
from common.types import MediaItem, RolloutRequest, SamplingParams, TextPrompt
from learner.weights.snapshot import Snapshot, Snapshotter
from tests.audit.watch import use_everything, watched_actor
from tests.contract.conftest import png

IMAGE = MediaItem(content_hash(png()), png())
REQUEST = RolloutRequest("g", TextPrompt("What is this?"), (IMAGE,), SamplingParams(n=2, max_tokens=4))


@pytest.fixture
def update() -> Snapshot:
    taken = Snapshotter(torch.nn.Linear(4, 4), [], is_sender=True, bucket_bytes=2**20).take(1)
    assert taken is not None
    return taken


async def test_nothing_is_unpickled_while_serving(tmp_path: Path, update: Snapshot) -> None:
    with watched_actor(tmp_path, "--engine", "fake") as actor:
        await use_everything(actor.address, REQUEST, update)
        assert actor.unpickled() == []


async def test_a_handler_that_unpickles_is_seen(tmp_path: Path, update: Snapshot) -> None:
    with watched_actor(tmp_path, "--engine", "fake", module="tests.audit.sabotaged") as actor:
        await use_everything(actor.address, REQUEST, update)
        seen = actor.unpickled()
    assert {(entry["pid"], entry["name"]) for entry in seen} == {(actor.pid, "collections.Counter")}
    assert len(seen) == 2  # one for each rollout
    assert all(any(caller.endswith("sabotaged.py:unpickling") for caller in entry["callers"]) for entry in seen)
