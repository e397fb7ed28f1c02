"""The supervision of NCCL, with a stand-in for torch's backend: deadlines, aborts, and who may begin."""

import gc
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.collective import nccl
from common.collective.nccl import NcclCommunicator
from common.types import EpochSpec

WAIT_S = 20.0


class _Work:
    def __init__(self, done: threading.Event) -> None:
        self.is_completed = done.is_set

    def wait(self) -> None:
        assert self.is_completed()


class _Backend:
    """Does nothing until it is told that its collectives are done."""

    class Options:
        pass

    made: list["_Backend"]

    def __init__(self, store: dist.Store, rank: int, size: int, options: Any) -> None:
        self.no_watchdog = os.environ.get("TORCH_NCCL_BLOCKING_WAIT")
        self.timeout_s = options._timeout.total_seconds()
        self.rank, self.size = rank, size
        self.done, self.aborted = threading.Event(), threading.Event()
        type(self).made.append(self)

    def broadcast(self, buffers: list[torch.Tensor], options: dist.BroadcastOptions) -> _Work:
        assert (options.rootRank, options.rootTensor, len(buffers)) == (0, 0, 1)
        return _Work(self.done)

    def abort(self) -> None:
        assert threading.current_thread().name == "abort-nccl"  # NCCL takes its time: nobody's event loop waits for it
        self.aborted.set()
        self.done.set()  # the kernel ends, with whatever is in the buffer


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[_Backend]:
    backends: list[_Backend] = []
    monkeypatch.setattr(_Backend, "made", backends, raising=False)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", _Backend, raising=False)
    return backends


def _join(
    rank: int = 0, world_size: int = 1, timeout_s: float = WAIT_S, port: int = 0, device: str = "cpu"
) -> NcclCommunicator:
    store = dist.TCPStore("127.0.0.1", port, is_master=port == 0, wait_for_workers=False)
    spec = EpochSpec("run", 1, "127.0.0.1", store.port, world_size, rank, "nccl", timeout_s)
    return NcclCommunicator(spec, rank, store, threading.Event(), torch.device(device))


@pytest.mark.parametrize("before", [None, "0"])
def test_torch_does_not_supervise(made: list[_Backend], monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """Its watchdog would end the process; groups of others keep theirs. The variable stays: other threads read some."""
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", before)
    _join(timeout_s=7.0)
    assert [(backend.no_watchdog, backend.timeout_s) for backend in made] == [("1", 7.0)]
    assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "0"


def test_nobody_begins_before_all_are_there(made: list[_Backend]) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(_join, 0, 2, WAIT_S, store.port)
        store.wait(["here/0"])
        assert not made
        second = threads.submit(_join, 1, 2, WAIT_S, store.port)
        first.result(WAIT_S)
        second.result(WAIT_S)
    assert sorted((backend.rank, backend.size) for backend in made) == [(0, 2), (1, 2)]


def test_a_member_that_never_comes(made: list[_Backend]) -> None:
    with pytest.raises(RuntimeError):
        _join(0, 2, timeout_s=0.5)
    assert not made


def test_a_broadcast_returns_when_the_bytes_are_there(made: list[_Backend]) -> None:
    communicator = _join()
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(communicator.broadcast, torch.zeros(1))
        assert not sending.done()
        made[0].done.set()
        sending.result(WAIT_S)
    assert not made[0].aborted.is_set()


def test_one_that_hangs_is_aborted_at_the_deadline(made: list[_Backend]) -> None:
    communicator = _join(timeout_s=0.3)
    started_at = time.monotonic()
    with pytest.raises(RuntimeError, match=r"timed out after 0.3 s"):
        communicator.broadcast(torch.zeros(1))
    assert time.monotonic() - started_at >= 0.3
    assert made[0].aborted.wait(WAIT_S)
    with pytest.raises(RuntimeError, match="aborted"):
        communicator.broadcast(torch.zeros(1))


def test_an_abort_from_another_thread_ends_it(made: list[_Backend]) -> None:
    communicator = _join()
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(communicator.broadcast, torch.zeros(1))
        communicator._aborted.set()  # as `BroadcastGroup.abort` does
        communicator.abort()
        communicator.abort()
        with pytest.raises(RuntimeError, match="aborted"):
            sending.result(WAIT_S)
    assert made[0].aborted.wait(WAIT_S)


def test_what_is_in_flight_outlives_the_abort(made: list[_Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel may write to the buffer until then: the memory must not be anybody else's."""
    ending = threading.Event()
    monkeypatch.setattr(_Backend, "abort", lambda _self: ending.wait(WAIT_S))
    communicator = _join(timeout_s=0.1)
    buffer = torch.zeros(1)
    there = weakref.ref(buffer)
    with pytest.raises(RuntimeError, match="timed out"):
        communicator.broadcast(buffer)
    del buffer
    gc.collect()
    assert there() is not None
    ending.set()
    deadline = time.monotonic() + WAIT_S
    while there() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
        gc.collect()
    assert there() is None


@pytest.mark.parametrize("num_draws", [0, 1, 31, 32, 45])
def test_groups_draw_the_same_stream_for_ever(
    made: list[_Backend], monkeypatch: pytest.MonkeyPatch, num_draws: int
) -> None:
    """torch hands 32 out in turn, to vLLM too: `num_draws` between two epochs, and one by each group."""
    drawn: list[int] = []

    def draw(_device: object) -> int:
        drawn.append(len(drawn) % 32)
        return drawn[-1]

    monkeypatch.setattr(torch.cuda, "Stream", draw)
    nccl._turn.cache_clear()
    nccl._stream.cache_clear()
    of_groups = set()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(40):
        _join(port=store.port, device="cuda:0")
        of_groups.add(draw(None))  # at its first collective
        for _ in range(num_draws):
            draw(None)
    own: object = nccl._stream(torch.device("cuda:0"))
    nccl._turn.cache_clear()
    nccl._stream.cache_clear()
    assert len(of_groups) == 1
    assert own not in of_groups
