"""The broadcast over real Gloo groups, each member in a thread of its own."""

import contextlib
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.collective import BroadcastGroup, gloo
from common.errors import RendezvousUnreachable
from common.types import EpochSpec

TIMEOUT_S = 20.0


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def join_all(store: dist.TCPStore, world_size: int, timeout_s: float = TIMEOUT_S) -> list[BroadcastGroup]:
    spec = EpochSpec("run", 1, "127.0.0.1", store.port, world_size, 0, "gloo", timeout_s)
    with ThreadPoolExecutor(world_size) as threads:
        return [future.result() for future in [threads.submit(BroadcastGroup, spec, r) for r in range(world_size)]]


def broadcast_all(groups: list[BroadcastGroup], buffers: list[torch.Tensor]) -> "list[Future[None]]":
    threads = ThreadPoolExecutor(len(groups))
    futures = [threads.submit(group.broadcast, buffer) for group, buffer in zip(groups, buffers, strict=True)]
    threads.shutdown(wait=False)
    return futures


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_everybody_gets_every_byte(store: dist.TCPStore, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo, "_CHUNK_BYTES", 1000)
    groups = join_all(store, world_size)
    for num_bytes in (0, 1, 999, 1000, 1001, 54_321):
        sent = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
        buffers = [sent, *(torch.zeros(num_bytes, dtype=torch.uint8) for _ in groups[1:])]
        for future in broadcast_all(groups, buffers):
            future.result(TIMEOUT_S)
        assert all(torch.equal(buffer, sent) for buffer in buffers)
    for group in groups:
        group.abort()


def test_pairs_share_a_thread_of_gloo(store: dist.TCPStore) -> None:
    def num_loops() -> int:
        names = []
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                names.append((task / "comm").read_text())
        return names.count("gloo_tcp_loop\n")

    gloo._device("127.0.0.1")
    before = num_loops()
    groups = join_all(store, 4)
    assert num_loops() == before
    for group in groups:
        group.abort()


def test_a_member_that_takes_no_part_fails_its_neighbours(store: dist.TCPStore) -> None:
    groups = join_all(store, 4, timeout_s=2.0)
    # The second receiver. What comes before it in the chain is whole; the learner hears of the others.
    present = [groups[i] for i in (0, 1, 3)]
    futures = broadcast_all(present, [torch.zeros(64 * 2**20, dtype=torch.uint8) for _ in present])
    for future in futures[1:]:
        with pytest.raises(RuntimeError):
            future.result(TIMEOUT_S)
    for group in groups:
        group.abort()


def test_abort_from_another_thread(store: dist.TCPStore) -> None:
    groups = join_all(store, 3)
    [waiting] = broadcast_all(groups[2:], [torch.zeros(8, dtype=torch.uint8)])
    groups[2].abort()
    with pytest.raises(RuntimeError, match="aborted"):
        waiting.result(TIMEOUT_S)
    with pytest.raises(RuntimeError, match="aborted"):
        groups[2].broadcast(torch.zeros(8, dtype=torch.uint8))
    for group in groups:
        group.abort()
        group.abort()


def test_a_member_that_never_comes(store: dist.TCPStore) -> None:
    spec = EpochSpec("run", 1, "127.0.0.1", store.port, 3, 0, "gloo", 1.0)
    failed: list[int] = []

    def join(rank: int) -> None:
        try:
            BroadcastGroup(spec, rank).abort()
        except RuntimeError:
            failed.append(rank)

    threads = [threading.Thread(target=join, args=[rank]) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert sorted(failed) == [1, 2]


def test_who_cannot_reach_the_rendezvous_says_so_before_the_others_are_late() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        # Nothing listens there any more, and torch would try again and again for its whole timeout and longer.
    started_at = time.monotonic()
    with pytest.raises(RendezvousUnreachable, match=f"the rendezvous at 127.0.0.1:{port} cannot be reached: .*refused"):
        BroadcastGroup(EpochSpec("run", 1, "127.0.0.1", port, 2, 0, "gloo", 5.0), 1)
    assert time.monotonic() - started_at < 4.0


def test_a_way_that_is_refused_for_a_moment_is_there() -> None:
    """As while the network of a pod is set up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    spec = EpochSpec("run", 1, "127.0.0.1", port, 2, 0, "gloo", TIMEOUT_S)
    with ThreadPoolExecutor(2) as threads:
        joining = [threads.submit(BroadcastGroup, spec, rank) for rank in range(2)]
        time.sleep(0.5)
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        for future in joining:
            future.result(TIMEOUT_S).abort()
    assert store.port == port
