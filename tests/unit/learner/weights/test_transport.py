"""The learner's own way into an epoch, while somebody is missing."""

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from common.collective import BroadcastGroup
from common.errors import Unreachable
from common.types import EpochSpec
from learner.weights.buckets import NotFilled
from learner.weights.epoch import EpochFailed, open_epoch
from learner.weights.transport import TorchTransport
from tests.helpers.epoch_clients import Client, member
from tests.helpers.futures import done

SPEC = EpochSpec("run", 1, "127.0.0.1", 0, 2, 0, "gloo", timeout_s=10.0)


def receive(spec: EpochSpec, buffer: torch.Tensor) -> None:
    """As the other member."""
    group = BroadcastGroup(spec, 1)
    try:
        group.broadcast(buffer)
    finally:
        group.abort()


async def test_joining_and_sending_take_no_thread_that_others_need() -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    transport = TorchTransport("127.0.0.1")
    spec = replace(SPEC, master_port=transport.port)
    joining = asyncio.ensure_future(transport.join(spec))
    await asyncio.sleep(0)
    await asyncio.to_thread(lambda: None)
    assert not joining.done()
    buffer = torch.zeros(3)
    receiving = asyncio.create_task(asyncio.to_thread(receive, spec, buffer))
    sender = await joining
    await sender.send([torch.arange(3.0)], [done(0)])  # the receiver has the only thread of the loop
    await receiving
    sender.abort()
    assert buffer.tolist() == [0, 1, 2]


async def test_a_buffer_is_sent_as_soon_as_it_is_filled_and_not_before() -> None:
    transport = TorchTransport("127.0.0.1")
    spec = replace(SPEC, master_port=transport.port)
    sent, received = [torch.zeros(2), torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]
    has_first = threading.Event()

    def receive_both() -> None:
        group = BroadcastGroup(spec, 1)
        group.broadcast(received[0])
        has_first.set()
        group.broadcast(received[1])
        group.abort()

    receiving = asyncio.create_task(asyncio.to_thread(receive_both))
    sender = await transport.join(spec)
    filled: list[Future[int]] = [Future(), Future()]
    sending = asyncio.create_task(sender.send(sent, filled))
    for i, buffer in enumerate(sent):
        buffer.fill_(i + 1)
        filled[i].set_result(0)
        assert await asyncio.to_thread(has_first.wait, 10)  # without the second one
    await asyncio.gather(sending, receiving)
    sender.abort()
    assert [buffer.tolist() for buffer in received] == [[1, 1], [2, 2]]


async def test_what_is_never_filled_is_never_sent() -> None:
    transport = TorchTransport("127.0.0.1")
    spec = replace(SPEC, master_port=transport.port)
    sender, other = await asyncio.gather(transport.join(spec), asyncio.to_thread(BroadcastGroup, spec, 1))
    broken: Future[int] = Future()
    broken.set_exception(NotFilled("the copy broke off"))
    with pytest.raises(NotFilled):
        await sender.send([torch.zeros(1)], [broken])
    sender.abort()
    other.abort()


async def test_the_rendezvous_keeps_nothing_of_epochs_that_have_ended() -> None:
    """A run of weeks has thousands of them."""
    transport = TorchTransport("127.0.0.1")
    for epoch in (9, 90, 91):
        spec = replace(SPEC, epoch=epoch, master_port=transport.port)
        joined = await asyncio.gather(transport.join(spec), asyncio.to_thread(BroadcastGroup, spec, 1))
        keys = transport._store.list_keys()
        assert keys
        assert {key.split("/")[:2] == ["run", f"{epoch}"] for key in keys} == {True}
        for one in joined:
            one.abort()


async def test_a_join_that_begins_late_leaves_the_keys_of_the_next_epoch_alone() -> None:
    """It was given up before its thread had run; the members of the next epoch are at the rendezvous by then."""
    transport = TorchTransport("127.0.0.1")
    for key in ("run/8//x", "run/10//x"):
        transport._store.set(key, "")
    late = replace(SPEC, epoch=9, master_port=transport.port, timeout_s=1.0)
    with pytest.raises(RuntimeError):
        await transport.join(late)
    keys = transport._store.list_keys()
    assert "run/10//x" in keys
    assert "run/8//x" not in keys


async def test_a_join_that_is_given_up_leaves_nothing_behind() -> None:
    """The member that is waited for comes only then: it finds nobody, and nothing has held up the end until then."""
    transport = TorchTransport("127.0.0.1")
    spec = replace(SPEC, master_port=transport.port, timeout_s=2.0)
    dead = member(Client("one#1", Unreachable("it was killed")))
    with pytest.raises(EpochFailed, match="it was killed"):
        await open_epoch(spec, [dead], transport)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    [joining] = [thread for thread in threading.enumerate() if thread.name == "join-epoch-1"]
    assert joining.daemon
    with pytest.raises(RuntimeError):
        await asyncio.to_thread(receive, spec, torch.zeros(3))
    joining.join(10)
    assert not joining.is_alive()
