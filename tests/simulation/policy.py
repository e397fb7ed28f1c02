"""Weights as numbers: what a bucket holds, and which policy a set of buckets makes.

A policy has one frozen bucket, which is sent to newcomers only, and two that train. Where these are an adapter, another
frozen bucket, with the adapter merged into it, can stand for all three.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from common.types import ManifestParameter
from learner.weights.buckets import Buckets, Update
from learner.weights.snapshot import AdapterFacts, Snapshot
from tests.helpers.futures import done

_FROZEN = 7
_MERGED = 10_000_000_000
_NUM_TRAINED = 2
_PER_RUN = 100_000


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole policy: of one run, at one version."""

    run: int
    version: int

    @staticmethod
    def parameter(bucket: int) -> dict[str, int]:
        """What this bucket sets. A corrupt one sets nonsense; a merged one takes the adapter away."""
        if bucket >= _MERGED:
            return {"frozen": bucket, "trained0": 0, "trained1": 0}
        return {"frozen": bucket} if bucket <= _FROZEN + 1 else {f"trained{bucket % 10}": bucket}

    @classmethod
    def of(cls, live: Mapping[str, int]) -> "Policy | None":
        """The policy that these parameters are, or None if they are none, as with an adapter on a merged one."""
        frozen, trained = live.get("frozen", 0), [live.get(f"trained{i}", -1) for i in range(_NUM_TRAINED)]
        if frozen >= _MERGED and trained == [0, 0]:
            frozen, trained = _FROZEN, [frozen - _MERGED, frozen - _MERGED + 1]
        if frozen != _FROZEN or trained[1] != trained[0] + 1:
            return None
        return cls(trained[0] // _PER_RUN, trained[0] % _PER_RUN // 10)


class AdapterSnapshot(Snapshot):
    """What trains is an adapter; merged it is one number as well."""

    def update(self, *, full: bool, merged: bool = False, keep: bool = False) -> Update:
        if not merged:
            return super().update(full=full, keep=keep)
        whole = _buckets("frozen", [_MERGED + int(self.trained.buffers[0])])
        return Snapshot(self.version, whole, whole, trains_vision=False).update(full=False)


def snapshot(run: int, version: int, *, is_adapter: bool) -> Snapshot:
    """What the trainer hands over, before it is filled: `fill` does that. Runs count from 1."""
    first = run * _PER_RUN + version * 10
    trained, frozen = _buckets("trained", [first, first + 1], is_filled=False), _buckets("frozen", [_FROZEN])
    if is_adapter:
        return AdapterSnapshot(version, trained, frozen, trains_vision=False, adapter=AdapterFacts(1, {}))
    return Snapshot(version, trained, frozen, trains_vision=False)


async def fill(taken: Snapshot, gather_s: float) -> None:
    """Bucket by bucket."""
    for buffer, checksum in zip(taken.trained.buffers, taken.trained.checksums, strict=True):
        await asyncio.sleep(gather_s / len(taken.trained.buffers))
        buffer.neg_()
        checksum.set_result(int(buffer))


def _buckets(name: str, values: list[int], *, is_filled: bool = True) -> Buckets:
    """What is not filled has other values."""
    parameters = tuple(ManifestParameter(f"{name}{i}", "I64", (1,), i, 0) for i in range(len(values)))
    if is_filled:
        return Buckets(parameters, tuple(torch.tensor(value) for value in values), tuple(map(done, values)))
    checksums: tuple[Future[int], ...] = tuple(Future() for _ in values)
    for checksum in checksums:
        checksum.set_running_or_notify_cancel()
    return Buckets(parameters, tuple(torch.tensor(-value) for value in values), checksums)
