"""Weights as numbers: what a bucket holds, and which policy a set of buckets makes.

A policy has one frozen bucket, which is sent to newcomers only, and two that train.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from common.types import ManifestParameter
from learner.weights.buckets import Buckets
from learner.weights.snapshot import Snapshot

_FROZEN = 7
_NUM_TRAINED = 2
_PER_RUN = 100_000


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole policy: of one run, at one version."""

    run: int
    version: int

    @staticmethod
    def parameter(bucket: int) -> dict[str, int]:
        """What this bucket sets. A corrupt one sets nonsense."""
        return {"frozen": bucket} if bucket <= _FROZEN + 1 else {f"trained{bucket % 10}": bucket}

    @classmethod
    def of(cls, live: Mapping[str, int]) -> "Policy | None":
        """The policy that these parameters are, or None if they are none."""
        trained = [live.get(f"trained{i}", -1) for i in range(_NUM_TRAINED)]
        if live.get("frozen") != _FROZEN or trained[1] != trained[0] + 1:
            return None
        return cls(trained[0] // _PER_RUN, trained[0] % _PER_RUN // 10)


def snapshot(run: int, version: int) -> Snapshot:
    """What the trainer hands over. Runs count from 1."""
    first = run * _PER_RUN + version * 10
    return Snapshot(
        version, _buckets("trained", [first, first + 1]), _buckets("frozen", [_FROZEN]), trains_vision=False
    )


def _buckets(name: str, values: list[int]) -> Buckets:
    parameters = tuple(ManifestParameter(f"{name}{i}", "I64", (1,), i, 0) for i in range(len(values)))
    return Buckets(parameters, tuple(torch.tensor(value) for value in values), tuple(values))
