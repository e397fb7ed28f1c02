"""Updates of a vLLM engine, with engines that are made up."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from actor.engine_vllm.updates import VllmUpdates
from actor.weights.adapters import Adapters
from common.errors import (
    InvalidRequest,
    OutriderError,
    RendezvousUnreachable,
    StageBlocked,
    StageCorrupt,
    StageTimeout,
    TooLarge,
)
from common.types import Manifest


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"kind": "ValueError", "error": "no layer w"}, InvalidRequest("manifest.parameters", "no layer w")),
        (
            {"kind": "InvalidRequest", "error": "odd", "field": "manifest.adapter"},
            InvalidRequest("manifest.adapter", "odd"),
        ),
        ({"kind": "StageCorrupt", "error": "bucket 3"}, StageCorrupt("bucket 3")),
        ({"kind": "RendezvousUnreachable", "error": "no route"}, RendezvousUnreachable("no route")),
        (
            {"kind": "OutOfMemoryError", "error": "CUDA out of memory."},
            TooLarge("", "a worker has no memory for its part: OutOfMemoryError: CUDA out of memory."),
        ),
        ({"kind": "MemoryError", "error": ""}, TooLarge("", "a worker has no memory for its part: MemoryError: ")),
        (
            {"kind": "DistBackendError", "error": "Cuda failure 2 'out of memory'"},
            TooLarge("", "a worker has no memory for its part: DistBackendError: Cuda failure 2 'out of memory'"),
        ),
        ({"kind": "OSError", "error": "gone"}, StageTimeout("a worker could not finish its part: OSError: gone")),
        (
            {"kind": "OSError", "error": "gone", "blocked": True},
            StageBlocked("a worker could not finish its part: OSError: gone"),
        ),
    ],
)
async def test_what_a_worker_reports(report: dict[str, Any], expected: OutriderError) -> None:
    async def collective_rpc(_method: str, args: Any) -> list[dict[str, Any]]:
        return [{"done": True, "field": None, "blocked": False} | report]

    engine: Any = SimpleNamespace(collective_rpc=collective_rpc)
    updates = VllmUpdates(lambda: engine, Adapters("model", 0, 0))
    with pytest.raises(type(expected)) as raised:
        await updates.stage(Manifest(1, (), (), updates_vision=False), 1.0)
    assert (type(raised.value), str(raised.value)) == (type(expected), str(expected))


@pytest.mark.parametrize("is_reset", [True, False])
async def test_no_keys_of_the_old_weights_are_left_in_any_cache(is_reset: bool) -> None:
    """Not in one outside the engine either; and if one keeps them, no policy is served."""
    engine: Any = AsyncMock()
    engine.collective_rpc.return_value = [{"done": True, "error": None, "field": None, "result": ()}]
    engine.reset_prefix_cache.return_value = is_reset
    updates = VllmUpdates(lambda: engine, Adapters("model", 0, 0))
    await updates.stage(Manifest(1, (), (), updates_vision=False), 1.0)
    if is_reset:
        await updates.commit(1)
    else:
        with pytest.raises(RuntimeError, match="still hold keys and values of the old weights"):
            await updates.commit(1)
    engine.reset_prefix_cache.assert_awaited_once_with(reset_running_requests=True, reset_connector=True)
    assert engine.resume_generation.await_count == is_reset
