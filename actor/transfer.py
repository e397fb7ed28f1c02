"""The receiving end of a weight update, as it runs inside each engine worker (and in the fake engine).

Joining an epoch and receiving an update both wait for other machines, so they run on a thread of their own while the
worker goes on generating. What arrives lies in staging memory, private to this class, until it is asked for: a torn,
late or corrupt update never touches the model.
"""

import math
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import torch

from common.collective import BroadcastGroup
from common.dtypes import TORCH_DTYPES
from common.types import EpochSpec, Manifest

T = TypeVar("T")


class WeightReceiver:
    """Joins epochs and receives updates, one job at a time, in the background.

    A job is started by `join` or `receive` and watched through the `Future` that they return; `leave` fails it.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """`device`: of the worker; a thread that joins an epoch does not inherit it."""
        self._device = device
        self._group: BroadcastGroup | None = None
        self._generation = 0  # of the epoch: a job that outlives its epoch finds another number and stores nothing
        self._staged: tuple[Manifest, list[torch.Tensor]] | None = None
        self._lock = threading.Lock()

    def join(self, spec: EpochSpec, rank: int) -> "Future[None]":
        """Enter an epoch as `rank`, leaving the one before."""
        self.leave()
        generation = self._generation

        def job() -> None:
            group = BroadcastGroup(spec, rank, self._device)
            with self._lock:
                if generation == self._generation:
                    self._group = group
                    return
            group.abort()
            raise RuntimeError("the weight epoch was left while joining it")

        return _run_in_thread(job, f"join-epoch-{spec.epoch}")

    def receive(self, manifest: Manifest) -> "Future[tuple[int, ...]]":
        """Receive every bucket of one update into staging memory; the crc32 of each, as received.

        `manifest` adds up: `common.wire` has checked it.
        """
        group, generation = self._group, self._generation
        if group is None:
            raise RuntimeError("no weight epoch has been joined")
        self._staged = None

        def job() -> tuple[int, ...]:
            buffers, checksums = [], []
            for bucket in manifest.buckets:
                buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=group.device)
                group.broadcast(buffer)
                buffers.append(buffer)
                checksums.append(zlib.crc32(buffer.cpu().numpy().data))
            with self._lock:
                if generation != self._generation:
                    raise RuntimeError("the weight epoch was left while receiving")
                self._staged = (manifest, buffers)
            return tuple(checksums)

        return _run_in_thread(job, f"receive-version-{manifest.policy_version}")

    def take(self, policy_version: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The staged tensors by their checkpoint names, as views on staging memory, which is given up.

        Raises:
            RuntimeError: this version is not staged.
        """
        if self._staged is None or self._staged[0].policy_version != policy_version:
            raise RuntimeError(f"version {policy_version} is not staged")
        (manifest, buffers), self._staged = self._staged, None
        for parameter in manifest.parameters:
            dtype = TORCH_DTYPES[parameter.dtype]
            num_bytes = math.prod(parameter.shape) * dtype.itemsize
            flat = buffers[parameter.bucket][parameter.offset : parameter.offset + num_bytes]
            yield parameter.name, flat.view(dtype).view(parameter.shape)

    def leave(self) -> None:
        """Drop what is staged and leave the epoch; a job under way fails soon. Idempotent."""
        with self._lock:
            self._generation += 1
            group, self._group = self._group, None
            self._staged = None
        if group is not None:
            group.abort()


def _run_in_thread(job: Callable[[], T], name: str) -> "Future[T]":
    """Run `job` on a daemon thread, so that a job that is stuck cannot hold up the end of the process."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # a waiter that gives up cannot cancel what a thread is doing

    def run() -> None:
        try:
            result = job()
        except BaseException as error:  # noqa: BLE001 - the future carries it to whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
