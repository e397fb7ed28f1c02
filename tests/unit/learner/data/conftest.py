"""Rows from a module that a test fills, and no cache that outlives it."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.rows import MODULE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `datasets` caches goes away with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module
    yield module
    del sys.modules[MODULE]
