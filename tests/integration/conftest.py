"""The tiny Qwen2.5-VL on the real engine, beside the same checkpoint in stock transformers.

A module asks for `actor`, and says by a fixture `engine_settings` of its own what its engine has that others do not.
vLLM is imported when an actor starts, not when tests are collected.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from examples.digits.model import build_model
from tests.helpers.enlarged import enlarge

if TYPE_CHECKING:
    from tests.integration.live_actor import LiveActor, WeightSource


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose outputs differ enough for mistakes to show."""
    from transformers import AutoModelForImageTextToText

    path = build_model(tmp_path_factory.mktemp("tiny"), seed=0)
    enlarge(AutoModelForImageTextToText.from_pretrained(path)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(model_dir).eval()


@pytest.fixture(scope="module")
def hf(model_dir: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def engine_settings() -> dict[str, Any]:
    """Fields of `VllmConfig`."""
    return {}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def actor(model_dir: Path, engine_settings: dict[str, Any]) -> "AsyncIterator[LiveActor]":
    from tests.integration.live_actor import running

    async with running(model_dir, **engine_settings) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def source(actor: "LiveActor") -> "AsyncIterator[WeightSource]":
    from tests.integration.live_actor import WeightSource

    learner = WeightSource(actor)
    yield learner
    await learner.abort()
