"""`python -m tests.kills` with other troubles than kills: actors that are restarted in turn, stopped, scaled."""

import ast
import re
from pathlib import Path

import pytest

from tests.helpers.launched import launching
from tests.kills.runs import SIZES

LINE = re.compile(r"(.+) in \d+ s: \d+ groups .*; sent again (\{.*?\}); longest time between two steps ([\d.]+) s")
# What becomes of a group now and then in any run: its step was full before it came, and it is too old for the next.
USUAL = {"STALE"}

pytestmark = pytest.mark.slow


def outcome(folder: Path, what: str) -> tuple[str, dict[str, int], float]:
    """What has happened, the groups that were sent again, the longest step in seconds."""
    with launching(folder) as launch:
        command = launch(what, module="tests.kills")
        code = command.exit_code(550)
        assert code == 0, command.said()
        last = LINE.fullmatch(command.stdout.splitlines()[-1])
        assert last is not None, command.said()
    happened, again, longest = last.groups()
    return happened, ast.literal_eval(again), float(longest)


def test_a_rolling_restart_breaks_off_nothing(tmp_path: Path) -> None:
    """What an actor refuses because it drains has not begun. A group that had would be UNREACHABLE."""
    happened, again, _ = outcome(tmp_path, "--rolling")
    assert happened == "6 of 6 actors restarted"
    assert again.keys() <= {"DRAINING"} | USUAL


def test_a_stopped_actor_leaves_the_others_their_throughput(tmp_path: Path) -> None:
    """Counted from the stop on, so with the time until it is noticed, and the update that it holds up."""
    happened, again, _ = outcome(tmp_path, "--stop")
    share = re.fullmatch(r"1 of 3 actors stopped, throughput ([\d.]+) of that of 2", happened)
    assert share is not None, happened
    assert float(share[1]) >= 0.95
    assert again.keys() <= {"UNREACHABLE"} | USUAL
    assert 1 <= again["UNREACHABLE"] <= 4  # it has four slots


def test_a_fleet_is_scaled_under_a_learner_that_goes_on(tmp_path: Path) -> None:
    """Nothing is asked of an actor without weights, nothing finished is lost, and the learner goes on at each change.

    Of an actor that leaves something may be asked until the next poll: it refuses, or nobody is there.
    """
    happened, again, longest_s = outcome(tmp_path, "--scale")
    assert happened == f"{' -> '.join(map(str, SIZES))} actors, at {SIZES[-1]}"
    assert again.keys() <= {"DRAINING", "UNREACHABLE"} | USUAL
    assert sum(num for reason, num in again.items() if reason not in USUAL) <= max(SIZES) - min(SIZES[2:])
    # With one actor a step takes nearly four seconds.
    assert longest_s < 15
