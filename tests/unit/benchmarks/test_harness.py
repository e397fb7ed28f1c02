"""The arithmetic of the benchmarks, and that they refuse unequal work."""

import json
from collections.abc import Callable

import pytest

from benchmarks import harness


def _rates(*values: float) -> Callable[[], float]:
    iterator = iter(values)
    return lambda: next(iterator)


def test_ratio_is_the_median_of_the_pairs_not_the_ratio_of_the_medians() -> None:
    # Pairs: 10/10 = 1, 30/10 = 3, 40/20 = 2. The ratio of the medians would be 30/10 = 3.
    result = harness.compare("case", _rates(10, 30, 40), _rates(10, 10, 20), pairs=3, goal=1.5, unit="things/s")
    assert result.ratios == (1.0, 3.0, 2.0)
    assert (result.ratio, result.low, result.high) == (2.0, 1.0, 3.0)


def test_rates_that_were_measured_before_pair_up() -> None:
    result = harness.compare_measured("case", [10, 30, 40], [10, 10, 20], goal=1.5, unit="things/s")
    assert result == harness.Comparison((1.0, 3.0, 2.0), 1.5)
    with pytest.raises(ValueError, match="zip"):
        harness.compare_measured("case", [1.0], [1.0, 2.0], goal=1.5, unit="things/s")


def test_sides_take_turns() -> None:
    turns: list[str] = []

    def take(who: str) -> float:
        turns.append(who)
        return 1.0

    harness.compare("case", lambda: take("ours"), lambda: take("peer"), pairs=2, goal=1.0, unit="things/s")
    assert turns == ["ours", "peer", "ours", "peer"]


def test_report_is_the_last_line_and_has_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    harness.say("working")
    harness.report("name", {"a": harness.Comparison((1.0, 2.0, 4.0), 1.5), "b": harness.Comparison((0.5,), 0.9)})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "name": "name",
        "ratio": {"a": 2.0, "b": 0.5},
        "low": {"a": 1.0, "b": 0.5},
        "high": {"a": 4.0, "b": 0.5},
        "goal": {"a": 1.5, "b": 0.9},
        "pairs": 1,
    }


def test_table_has_a_row_for_each_case_and_marks_a_missed_goal() -> None:
    line = harness.report("name", {"a": harness.Comparison((2.0,), 1.5), "b": harness.Comparison((0.5,), 0.9)})
    header, first, second = harness.table([line]).splitlines()
    assert header.split()[:3] == ["benchmark", "case", "ratio"]
    assert first.split() == ["name", "a", "2.00", "2.00", "to", "2.00", "1.50", "1", "reached"]
    assert second.split()[-1] == "MISSED"


def test_unequal_work_is_refused() -> None:
    harness.require_equal("tokens", [1, 2], [1, 2])
    with pytest.raises(harness.UnequalWorkError, match=r"tokens differ: ours \[1, 2\], the peer's \[1, 3\]"):
        harness.require_equal("tokens", [1, 2], [1, 3])
    harness.require_close("mean length", 12.9, 12.0, 0.1)
    with pytest.raises(harness.UnequalWorkError, match=r"mean length is 13\.3, not 12 within 10%"):
        harness.require_close("mean length", 13.3, 12.0, 0.1)
