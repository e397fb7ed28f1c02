"""Which rows go to which rank and micro-batch: equal cost for the ranks, few micro-batches, none over its budget."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Bins = list[list[list[int]]]


def balance(num_tokens: Sequence[int], costs: Sequence[float], num_ranks: int, max_tokens: int) -> Bins:
    """Distribute rows, dearest first, each to the cheapest bin that has room for it.

    With r ranks and the fewest micro-batches m for which that works, there are r * m bins; each rank gets m. A row
    longer than `max_tokens` is alone in its bin.

    Args:
        num_tokens: of each row.
        costs: of each row, in any unit; see `ModelCost`.
        num_ranks: ranks that train.
        max_tokens: tokens of a bin.

    Returns:
        `bins[rank][micro_batch]` = ascending row numbers; bins may be empty when there are fewer rows than bins.
    """
    order = sorted(range(len(num_tokens)), key=lambda row: (-costs[row], row))
    # With fewer no distribution has room for all; a row over the budget has no more than a bin.
    num_micro_batches = -(-sum(min(tokens, max_tokens) for tokens in num_tokens) // (num_ranks * max_tokens))
    while True:
        bins = _fill(order, num_tokens, costs, num_ranks * num_micro_batches, max_tokens)
        if bins is not None:
            return _deal(bins, costs, num_ranks)
        num_micro_batches += 1


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a model's parts cost, in units of what the linear layers of its text model cost for one token."""

    hidden_size: int = 2048
    """Of the text model: a layer of width h costs about 24 h^2 operations for a token in its linear layers and 4 h for
    each token that it attends to."""
    pixel_value: float = 0.0
    """Of the vision tower, for one element of `pixel_values`."""

    def text(self, num_tokens: int) -> float:
        """Of a row of so many tokens."""
        return num_tokens * (1 + num_tokens / (6 * self.hidden_size))

    def images(self, media: Mapping[str, Any]) -> float:
        """Of what a prompt's images pass before the text model."""
        pixels = media.get("pixel_values")
        return self.pixel_value * pixels.numel() if pixels is not None else 0.0


def _fill(
    order: Sequence[int], num_tokens: Sequence[int], costs: Sequence[float], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Rows into bins, or None if a row found no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    used = [0] * num_bins
    cheapest = [(0.0, index) for index in range(num_bins)]
    for row in order:
        full: list[tuple[float, int]] = []
        while cheapest and used[cheapest[0][1]] and used[cheapest[0][1]] + num_tokens[row] > max_tokens:
            full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        cost, index = heapq.heappop(cheapest)
        bins[index].append(row)
        used[index] += num_tokens[row]
        for entry in (*full, (cost + costs[row], index)):
            heapq.heappush(cheapest, entry)
    return [sorted(bin_) for bin_ in bins]


def _deal(bins: list[list[int]], costs: Sequence[float], num_ranks: int) -> Bins:
    """Bins to ranks so that the i-th micro-batches of all ranks are alike: ranks wait for each other at each one."""
    ordered = sorted(bins, key=lambda bin_: -sum(costs[row] for row in bin_))
    return [ordered[rank::num_ranks] for rank in range(num_ranks)]
