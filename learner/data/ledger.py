"""The data order, and which part of it has been trained.

A *sequence number* is a place in the endless data order; which row of the dataset stands there is a pure function of
(seed, sequence): a fresh permutation of all rows in each pass. So a checkpoint needs no cursor of a data loader, only
the sequence numbers that were handed out and not finished. A resumed run hands those out first.

    new --next_sequence--> in flight --mark_trained--> trained
                            |  ^  |
                            |  |  +--mark_dropped--> dropped, with a counted reason
                            +--+ give_back (too stale), resume
"""

import heapq
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from common.config import ConfigError


class Ledger:
    """Hands out sequence numbers and remembers their fate. Thread-safe.

    Each sequence number ends exactly once, trained or dropped; whatever would end one twice raises `ValueError`.
    """

    def __init__(self, seed: int, num_rows: int) -> None:
        if num_rows < 1:
            raise ConfigError("the dataset has no rows; give one with at least one row")
        self.seed = seed
        self.num_rows = num_rows
        self._lock = threading.Lock()
        self._cursor = 0
        self._in_flight: set[int] = set()
        self._again: list[int] = []
        self._num_trained = 0
        self._dropped: dict[str, list[int]] = {}
        self._permutations: dict[int, npt.NDArray[np.int64]] = {}

    def row(self, sequence: int) -> int:
        """The row of the dataset at this place of the order: a pure function of (seed, sequence)."""
        epoch, place = divmod(sequence, self.num_rows)
        with self._lock:
            if epoch not in self._permutations:
                # Neighbouring epochs are in flight together; older ones are computed again in the rare case.
                self._permutations = {e: p for e, p in self._permutations.items() if abs(e - epoch) <= 1}
                self._permutations[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
            return int(self._permutations[epoch][place])

    def next_sequence(self) -> int:
        """The next sequence number to sample; it is in flight from now on. Those given back come first."""
        with self._lock:
            if self._again:
                sequence = heapq.heappop(self._again)
            else:
                sequence = self._cursor
                self._cursor += 1
            self._in_flight.add(sequence)
            return sequence

    def give_back(self, sequence: int) -> None:
        """Hand out this sequence number again: its group came too late, or never."""
        with self._lock:
            self._end(sequence)
            heapq.heappush(self._again, sequence)

    def mark_trained(self, sequences: Iterable[int]) -> None:
        """These groups are part of a step that has been taken."""
        with self._lock:
            for sequence in sequences:
                self._end(sequence)
                self._num_trained += 1

    def mark_dropped(self, sequence: int, reason: str) -> None:
        """This prompt will not be trained, for a reason that is counted."""
        with self._lock:
            self._end(sequence)
            self._dropped.setdefault(reason, []).append(sequence)

    def _end(self, sequence: int) -> None:
        if sequence not in self._in_flight:
            raise ValueError(f"sequence {sequence} is not in flight: it was never handed out, or has ended already")
        self._in_flight.remove(sequence)

    @property
    def num_trained(self) -> int:
        """Groups trained so far, over all incarnations of the run."""
        return self._num_trained

    @property
    def in_flight(self) -> frozenset[int]:
        """Sequence numbers handed out or waiting to be handed out again, neither trained nor dropped."""
        with self._lock:
            return frozenset(self._in_flight).union(self._again)

    @property
    def dropped(self) -> dict[str, list[int]]:
        """Reason -> sequence numbers dropped for it."""
        with self._lock:
            return {reason: list(sequences) for reason, sequences in self._dropped.items()}

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON values, for a checkpoint."""
        with self._lock:
            return {
                "seed": self.seed,
                "num_rows": self.num_rows,
                "cursor": self._cursor,
                "in_flight": sorted(self._in_flight.union(self._again)),
                "num_trained": self._num_trained,
                "dropped": {reason: list(sequences) for reason, sequences in self._dropped.items()},
            }

    @classmethod
    def from_dict(cls, state: dict[str, Any], *, seed: int, num_rows: int) -> "Ledger":
        """The ledger of a checkpoint; what was in flight is handed out again, first.

        Raises `ConfigError` if the run now has another seed or dataset length: the order would be another one.
        """
        for name, now in (("seed", seed), ("num_rows", num_rows)):
            if state[name] != now:
                raise ConfigError(
                    f"the checkpoint was written with {name} = {state[name]}, this run has {now}: "
                    "resume with the same seed and dataset, or start a new run in another folder"
                )
        ledger = cls(seed, num_rows)
        ledger._cursor = int(state["cursor"])
        ledger._again = sorted(int(sequence) for sequence in state["in_flight"])
        ledger._num_trained = int(state["num_trained"])
        ledger._dropped = {str(reason): [int(s) for s in sequences] for reason, sequences in state["dropped"].items()}
        return ledger
