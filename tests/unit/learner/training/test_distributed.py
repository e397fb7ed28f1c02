"""What joining the ranks sets up beside the process group."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from learner.training.distributed import join_ranks


@pytest.fixture
def rounding() -> Iterator[list[Any]]:
    """What may round float32 to TF32, all of it allowed to."""
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = _allowed(backends)
    _allow(backends, [True] * len(backends))
    yield backends
    _allow(backends, before)


def _allowed(backends: list[Any]) -> list[bool]:
    return [backend.allow_tf32 for backend in backends]


def _allow(backends: list[Any], values: list[bool]) -> None:
    for backend, value in zip(backends, values, strict=True):
        backend.allow_tf32 = value


def test_float32_stays_float32_on_cuda(monkeypatch: pytest.MonkeyPatch, rounding: list[Any]) -> None:
    """cuDNN rounds it by default: the embedding of patches is a convolution."""

    def stop(*_arguments: object, **_options: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "set_device", lambda _index: None)
    monkeypatch.setattr(dist, "init_process_group", stop)
    with pytest.raises(InterruptedError), join_ranks("cuda"):
        pass
    assert _allowed(rounding) == [False, False]
