"""Nothing is unpickled in a process that serves; and if something were, this would show."""

from pathlib import Path

import torch
import xxhash

from common.types import Manifest, ManifestBucket, ManifestParameter
from learner.weights.buckets import Update
from learner.weights.snapshot import Snapshotter
from tests.audit.everything import every_request, use_everything
from tests.audit.watch import WatchedActor, watched_actor
from tests.helpers.fake_actors import png
from tests.helpers.futures import done

FAKE = ("--engine", "fake", "fake.token_s=0", "fake.first_token_s=0", "fake.max_videos=1", "fake.max_lora_rank=4")


async def use(actor: WatchedActor) -> int:
    """All of it; the number of groups."""
    model = torch.nn.Linear(4, 4)
    snapshotter = Snapshotter(model, [], is_sender=True, bucket_bytes=2**20)
    first = snapshotter.take(1)
    with torch.no_grad():
        model.weight[0, 0] += 1
    second = snapshotter.take(2)
    assert first is not None
    assert second is not None
    matrices = (
        ManifestParameter("x.lora_A.weight", "F32", (1, 4), bucket=0, offset=0),
        ManifestParameter("x.lora_B.weight", "F32", (4, 1), bucket=0, offset=16),
    )
    checksum = xxhash.xxh3_64_intdigest(bytes(32))
    adapter = Manifest(3, matrices, (ManifestBucket(32, checksum),), updates_vision=False, adapter="policy")
    requests = every_request((png(0), png(1)))
    update = Update(adapter, (torch.zeros(32, dtype=torch.uint8),), (done(checksum),))
    return await use_everything(actor.address, requests, (first, second), update)


async def test_nothing_is_unpickled_while_serving(tmp_path: Path) -> None:
    with watched_actor(tmp_path, *FAKE) as actor:
        await use(actor)
        assert actor.unpickled() == []


async def test_a_handler_that_unpickles_is_seen(tmp_path: Path) -> None:
    with watched_actor(tmp_path, *FAKE, module="tests.audit.sabotaged") as actor:
        num_groups = await use(actor)
        seen = actor.unpickled()
    assert {(entry["pid"], entry["name"]) for entry in seen} == {(actor.pid, "collections.Counter")}
    assert len(seen) == num_groups
    assert all(any(caller.endswith("sabotaged.py:unpickling") for caller in entry["callers"]) for entry in seen)
