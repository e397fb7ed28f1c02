"""The receiving end of a weight update, as it runs inside each engine worker (and in the fake engine).

    wire --broadcast--> buffer --checksum--> Staging.add ... Staging.finish        then, at the commit: take

Joining an epoch and receiving an update both wait for other machines, so they run on threads of their own while the
worker goes on generating. What arrives goes into a `Staging`, which nobody serves from until it is asked for: a torn,
late or corrupt update never touches the model. Two buffers take turns: one is received while the other is worked on.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

import torch

from actor.weights.kept_buckets import KeptBuckets
from common.collective import BroadcastGroup
from common.dtypes import tensor_in
from common.process.threads import run_in_thread
from common.types import EpochSpec, Manifest, ManifestParameter

NUM_BUFFERS = 2

NamedTensors = Sequence[tuple[str, torch.Tensor]]


class Staging(Protocol):
    """Takes one update in, beside what is live."""

    def add(self, tensors: NamedTensors) -> None:
        """The next tensors, by their names in the manifest. They are views on memory that is used again afterwards."""
        ...

    def finish(self) -> None:
        """All have been added."""
        ...

    def discard(self) -> None:
        """It will not be used. Memory is given back now: whoever holds the error that led here still refers to it."""
        ...


StagingT = TypeVar("StagingT", bound=Staging)


class WeightReceiver:
    """Joins epochs and receives updates, one job at a time, in the background.

    A job is started by `join` or `receive` and watched through the `Future` that they return; `leave` fails it.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """`device`: of the worker; a thread that joins an epoch does not inherit it."""
        self._device = device
        self._group: BroadcastGroup | None = None
        self._generation = 0  # of the epoch: a job that outlives its epoch finds another number and stores nothing
        self._staged: tuple[int, Staging] | None = None
        self._memory = _Memory()
        self._kept = KeptBuckets()
        self._receiving: Future[tuple[int, ...]] | None = None
        # Always the same thread: glibc's malloc gives each thread memory of its own, and keeps what becomes free there.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._lock = threading.Lock()

    @property
    def is_blocked(self) -> bool:
        """See `BroadcastGroup.is_blocked`."""
        return self._group is not None and self._group.is_blocked

    def join(self, spec: EpochSpec, rank: int) -> "Future[None]":
        """Enter an epoch as `rank`, leaving the one before."""
        self.leave()
        generation = self._generation

        def job() -> None:
            group = BroadcastGroup(spec, rank, self._device)
            with self._lock:
                if generation == self._generation:
                    self._group = group
                    self._memory = _Memory()
                    return
            group.abort()
            raise RuntimeError("the weight epoch was left while joining it")

        return run_in_thread(job, f"join-epoch-{spec.epoch}")

    def receive(self, manifest: Manifest, staging: Staging) -> "Future[tuple[int, ...]]":
        """Receive every bucket of one update into `staging`; the checksum of each, as received.

        `manifest` adds up: `common.wire` has checked it.

        Raises:
            InvalidRequest: it is a delta from a version that is not here.
        """
        group, generation, memory = self._group, self._generation, self._memory
        if group is None:
            raise RuntimeError("no weight epoch has been joined")
        self._staged = None
        if self._receiving is not None and not self._receiving.done():
            self._kept = KeptBuckets()  # of an epoch that was left, and still at work on its memory
        kept = self._kept = self._kept.next(manifest)
        by_bucket: list[list[ManifestParameter]] = [[] for _ in manifest.buckets]
        for parameter in manifest.parameters:
            by_bucket[parameter.bucket].append(parameter)

        def work(buffer: torch.Tensor, index: int) -> int:
            with group.stream():
                whole, received = kept.take(buffer, index)
                staging.add([(parameter.name, tensor_in(whole, parameter)) for parameter in by_bucket[index]])
            return received

        def job() -> tuple[int, ...]:
            results: list[Future[int]] = []
            try:
                for i, bucket in enumerate(manifest.buckets):
                    if i >= NUM_BUFFERS:
                        results[i - NUM_BUFFERS].result()  # its buffer is free
                    with group.stream():
                        buffer = memory.take(i % NUM_BUFFERS, bucket.wire_bytes, group.device)
                        group.broadcast(buffer)
                    results.append(self._worker.submit(work, buffer, i))
                checksums = tuple(result.result() for result in results)
                self._worker.submit(staging.finish).result()
                with self._lock:
                    if generation != self._generation:
                        raise RuntimeError("the weight epoch was left while receiving")
                    self._staged = (manifest.policy_version, staging)
                    kept.is_whole = not manifest.wrong_buckets(checksums)
            except BaseException:
                for result in results:
                    result.cancel()
                wait(results)  # nobody is at work on the buffers any more
                staging.discard()
                raise
            return checksums

        self._receiving = run_in_thread(job, f"receive-version-{manifest.policy_version}")
        return self._receiving

    def take(self, policy_version: int, kind: type[StagingT]) -> StagingT:
        """What was staged for this version, which is given up here.

        Raises:
            RuntimeError: this version is not staged.
        """
        if self._staged is None or self._staged[0] != policy_version:
            raise RuntimeError(f"version {policy_version} is not staged")
        (_, staging), self._staged = self._staged, None
        assert isinstance(staging, kind)
        return staging

    def leave(self) -> None:
        """Drop what is staged and leave the epoch; a job under way fails soon. Idempotent."""
        with self._lock:
            self._generation += 1
            group, self._group = self._group, None
            self._staged = None
            self._memory = _Memory()
        if group is not None:
            group.abort()


class _Memory:
    """Buffers that are used again, on a CPU: memory that a process touches for the first time is slow."""

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}

    def take(self, index: int, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Buffer `index`, of so many bytes; the one before it is void."""
        kept = self._buffers.get(index)
        if kept is None or kept.numel() < num_bytes:
            kept = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            if device.type == "cpu":  # torch keeps the memory of a GPU by itself
                self._buffers[index] = kept
        return kept[:num_bytes]
