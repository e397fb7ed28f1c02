"""The broadcast group over the real NCCL: one GPU holds one rank, so it is groups of one, and their ends."""

import time

import pytest
import torch
import torch.distributed as dist

from common.collective import BroadcastGroup
from common.types import EpochSpec

TIMEOUT_S = 5.0


def _spec(store: dist.TCPStore, world_size: int, epoch: int) -> EpochSpec:
    return EpochSpec("run", epoch, "127.0.0.1", store.port, world_size, 0, "nccl", TIMEOUT_S)


def test_groups_come_and_go_beside_work_on_the_gpu() -> None:
    """One after the other, as epochs do; a kernel that runs meanwhile holds nobody up."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for epoch in (1, 2, 3):
        group = BroadcastGroup(_spec(store, 1, epoch), 0)
        torch.cuda._sleep(10**9)  # about half a second of the default stream
        started_at = time.monotonic()
        with group.stream():
            sent = torch.arange(2**20, dtype=torch.uint8, device=group.device)
            group.broadcast(sent)
        seconds = time.monotonic() - started_at
        still_at_work = not torch.cuda.default_stream().query()
        assert torch.equal(sent.cpu(), torch.arange(2**20, dtype=torch.uint8))
        assert still_at_work or seconds < 0.1
        group.abort()
        group.abort()
        with pytest.raises(RuntimeError, match="aborted"):
            group.broadcast(sent)


def test_a_peer_that_never_comes_then_another_epoch() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started_at = time.monotonic()
    with pytest.raises(RuntimeError):
        BroadcastGroup(_spec(store, 2, 1), 0)
    assert time.monotonic() - started_at < TIMEOUT_S + 2
    group = BroadcastGroup(_spec(store, 1, 2), 0)
    group.abort()


def test_all_groups_compute_on_the_same_stream() -> None:
    """However many epochs there are: the next draw is the same behind each of them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    drawn = set()
    for epoch in range(1, 5):
        BroadcastGroup(_spec(store, 1, epoch), 0).abort()
        drawn.add(torch.cuda.Stream())
        torch.cuda.Stream()
    assert len(drawn) == 1
