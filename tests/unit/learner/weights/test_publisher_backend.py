"""Which wire an epoch gets."""

from types import SimpleNamespace
from typing import Any

import pytest

from common.types import EpochSpec
from learner.weights import publisher as module
from learner.weights.publisher import Publisher


@pytest.mark.parametrize(
    ("said", "workers", "expected"),
    [
        (None, [1, 1], "nccl"),
        (None, [1, 4], "gloo"),  # the communicator of weights and vLLM's own, on one GPU, are ordered by nobody
        ("nccl", [1, 4], "nccl"),
        ("gloo", [1, 1], "gloo"),
    ],
)
async def test_the_wire_is_chosen_for_each_epoch(
    monkeypatch: pytest.MonkeyPatch, said: str | None, workers: list[int], expected: str
) -> None:
    opened: list[EpochSpec] = []

    async def open_epoch(spec: EpochSpec, members: Any, transport: Any) -> Any:
        opened.append(spec)
        return SimpleNamespace(members=members)

    monkeypatch.setattr(module, "open_epoch", open_epoch)
    fleet: Any = SimpleNamespace(subscribe=lambda _listener: None)
    transport: Any = SimpleNamespace(port=1)
    publisher = Publisher(fleet, run_id="run", host="", backend=said, timeout_s=5.0, transport=transport)
    members: Any = [SimpleNamespace(status=SimpleNamespace(num_workers=n), address=str(n)) for n in workers]
    await publisher._open(members)
    assert [(spec.backend, spec.world_size) for spec in opened] == [(expected, 1 + sum(workers))]
