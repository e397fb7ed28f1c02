"""How far generation may run ahead of training.

    dispatch a group while  accepted + running < (max_staleness + 1 + step) * batch

`step` counts batches trained, `batch` is groups per step, `accepted` counts the groups that reached the buffer
(those trained included) and `running` those on their way to it. The k-th group is trained at step `k // batch`, so the
inequality says: nothing is sampled more than `max_staleness` steps before it is used. `max_staleness = 0` is strictly
synchronous: a step's groups are sampled after the step before it.

For the same reason an actor may sample the k-th group only if its weights are at least of version
`k // batch - max_staleness`; otherwise the group would be too stale when its turn comes.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Credits:
    """The inequality above, as counters. Belongs to one event loop.

    Args:
        batch: groups of one step.
        max_staleness: versions that a group may be behind when it is trained.
        step: batches trained before this run (a resumed one); their groups count as accepted.
        total_steps: nothing is dispatched that no step will train; None is endless.

    Example: with `batch=4, max_staleness=1`, 8 groups may start at once; after the first step 4 more.
    """

    batch: int
    max_staleness: int
    step: int = 0
    total_steps: int | None = None
    accepted: int = 0
    running: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.max_staleness < 0:
            raise ValueError(
                f"batch must be 1 or more and max_staleness 0 or more, not {self.batch}, {self.max_staleness}"
            )
        self.accepted = self.step * self.batch

    @property
    def limit(self) -> int:
        """Groups that may have been accepted or be running, counted from the beginning of training."""
        steps = self.max_staleness + 1 + self.step
        return (steps if self.total_steps is None else min(steps, self.total_steps)) * self.batch

    @property
    def available(self) -> int:
        """Groups that may start now."""
        return max(0, self.limit - self.accepted - self.running)

    def start(self) -> int:
        """One group starts. Returns the step that will train it, if groups finish in order."""
        if not self.available:
            raise ValueError("no credit: ask `available` first")
        trained_at = (self.accepted + self.running) // self.batch
        self.running += 1
        return trained_at

    def accept(self) -> None:
        """A running group reached the buffer."""
        self._finish()
        self.accepted += 1

    def drop(self) -> None:
        """A running group came to nothing; its credit is free again."""
        self._finish()

    def take_back(self) -> None:
        """An accepted group turned out too stale to train; its credit is free again."""
        if self.accepted <= self.step * self.batch:
            raise ValueError("every accepted group has been trained")
        self.accepted -= 1

    def _finish(self) -> None:
        if not self.running:
            raise ValueError("no group is running")
        self.running -= 1
