"""Buckets of the last update in the host's memory, so that the next one need only say what changed."""

import torch

from common import delta
from common.checksum import checksum
from common.errors import InvalidRequest, StageCorrupt
from common.types import Manifest

_FIELD = "manifest.base_version"


class KeptBuckets:
    """What is kept of one update, the one that is being received included. `is_whole`: all of it is right.

    Each update starts from the kept buckets of the one before, which it takes over: if it fails, nothing is kept.
    """

    def __init__(self, manifest: Manifest | None = None, memory: "dict[int, torch.Tensor] | None" = None) -> None:
        self._manifest = manifest
        self._memory = memory or {}  # by bucket
        self.is_whole = False

    def next(self, manifest: Manifest) -> "KeptBuckets":
        """For the next update. Raises InvalidRequest if it is a delta from something that is not here."""
        old = [self._memory[index] for index in sorted(self._memory)]
        self._memory = {}
        if manifest.base_version < 0:
            wanted = [index for index, bucket in enumerate(manifest.buckets) if bucket.keep]
            # The memory of the version before is used again where it fits.
            fits = [
                old[i] if i < len(old) and old[i].numel() == manifest.buckets[index].num_bytes else None
                for i, index in enumerate(wanted)
            ]
            memory = {
                index: kept if kept is not None else torch.empty(manifest.buckets[index].num_bytes, dtype=torch.uint8)
                for index, kept in zip(wanted, fits, strict=True)
            }
            return KeptBuckets(manifest, memory)
        here = self._manifest.policy_version if self._manifest is not None and self.is_whole else None
        if here != manifest.base_version:
            raise InvalidRequest(_FIELD, f"version {manifest.base_version} is not kept here; send a full update")
        if [buffer.numel() for buffer in old] != [bucket.num_bytes for bucket in manifest.buckets]:
            raise InvalidRequest(_FIELD, f"the buckets of version {here} that are kept here are others")
        return KeptBuckets(manifest, dict(enumerate(old)))

    def take(self, received: torch.Tensor, index: int) -> tuple[torch.Tensor, int]:
        """What came for a bucket, as its bytes and their checksum. Raises StageCorrupt for a delta that is none."""
        assert self._manifest is not None
        kept = self._memory.get(index)
        if self._manifest.base_version >= 0:
            assert kept is not None
            try:
                delta.apply(received.cpu(), kept, self._manifest.buckets[index].word_bytes)
            except ValueError as error:
                raise StageCorrupt(f"bucket {index} came as no delta: {error}") from error
            return kept, checksum(kept)
        if kept is not None:
            kept.copy_(received)
        return received, checksum(received)
