"""How every benchmark measures: interleaved pairs, medians of ratios, and equal work on both sides.

A benchmark gives, for each case, two callables that return a rate (higher is better) for the same work: ours and the
peer's. `compare` lets them take turns A B A B ... on an otherwise idle machine, so that a slow phase of the machine
hits both, and takes the ratio within each pair. `report` prints the one JSON line by which a benchmark ends.

The ratio of a case is the median over its pairs; `low` and `high` are the smallest and the largest ratio seen.
"""

import json
import signal
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of one case.

    Example: `Comparison(ratios=(2.1, 2.4, 2.2), goal=2.0)` has the ratio 2.2, low 2.1, high 2.4.
    """

    ratios: tuple[float, ...]
    goal: float

    @property
    def ratio(self) -> float:
        """Median of ours / peer's."""
        return statistics.median(self.ratios)

    @property
    def low(self) -> float:
        """Smallest ratio of a pair."""
        return min(self.ratios)

    @property
    def high(self) -> float:
        """Largest ratio of a pair."""
        return max(self.ratios)


class UnequalWorkError(Exception):
    """The two sides did not do the same work, so that their rates say nothing."""


def say(text: str) -> None:
    """Tell what the benchmark is doing."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def end_cleanly() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that the processes of both sides end with it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def require_equal(what: str, ours: object, peer: object) -> None:
    """Raise `UnequalWorkError` unless both sides have the same value."""
    if ours != peer:
        raise UnequalWorkError(f"{what} differ: ours {_short(ours)}, the peer's {_short(peer)}")


def require_close(what: str, value: float, expected: float, tolerance: float) -> None:
    """Raise `UnequalWorkError` unless `value` is within the relative `tolerance` of `expected`."""
    if abs(value - expected) > tolerance * abs(expected):
        raise UnequalWorkError(f"{what} is {value:.4g}, not {expected:.4g} within {tolerance:.0%}")


@contextmanager
def stopped(processes: Collection[psutil.Process]) -> Iterator[None]:
    """Let them stand still: vLLM's workers on CPUs look for work without a pause, also when there is none."""
    try:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def compare(
    case: str, ours: Callable[[], float], peer: Callable[[], float], *, pairs: int, goal: float, unit: str
) -> Comparison:
    """Let both sides take `pairs` turns each; the callables have warmed up and return a rate in `unit`."""
    turns = ((ours(), peer()) for _ in range(pairs))
    return _compare_turns(case, turns, pairs=pairs, goal=goal, unit=unit)


def compare_measured(case: str, ours: Sequence[float], peer: Sequence[float], *, goal: float, unit: str) -> Comparison:
    """As `compare`, of rates that have been measured already, in turns."""
    return _compare_turns(case, zip(ours, peer, strict=True), pairs=len(ours), goal=goal, unit=unit)


def _compare_turns(
    case: str, turns: Iterable[tuple[float, float]], *, pairs: int, goal: float, unit: str
) -> Comparison:
    ratios = []
    for pair, (our_rate, peer_rate) in enumerate(turns, start=1):
        ratios.append(our_rate / peer_rate)
        say(
            f"{case}, pair {pair} of {pairs}: ours {our_rate:.1f}, the peer's {peer_rate:.1f} {unit}, "
            f"ratio {ratios[-1]:.2f}"
        )
    return Comparison(tuple(ratios), goal)


def report(name: str, comparisons: Mapping[str, Comparison]) -> str:
    """Print and return the last line of a benchmark: one JSON object."""
    line = json.dumps(
        {
            "name": name,
            "ratio": {case: round(result.ratio, 3) for case, result in comparisons.items()},
            "low": {case: round(result.low, 3) for case, result in comparisons.items()},
            "high": {case: round(result.high, 3) for case, result in comparisons.items()},
            "goal": {case: result.goal for case, result in comparisons.items()},
            "pairs": min(len(result.ratios) for result in comparisons.values()),
        }
    )
    print(line, flush=True)
    return line


def table(lines: Sequence[str]) -> str:
    """The JSON lines of several benchmarks as one table, a row for each case."""
    rows = [("benchmark", "case", "ratio", "low to high", "goal", "pairs", "")]
    for line in lines:
        result = json.loads(line)
        for case, ratio in result["ratio"].items():
            low, high, goal = (result[key][case] for key in ("low", "high", "goal"))
            verdict = "reached" if ratio >= goal else "MISSED"
            rows.append(
                (
                    result["name"],
                    case,
                    f"{ratio:.2f}",
                    f"{low:.2f} to {high:.2f}",
                    f"{goal:.2f}",
                    str(result["pairs"]),
                    verdict,
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
