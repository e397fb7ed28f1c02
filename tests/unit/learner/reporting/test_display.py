"""The display: what it says, on a terminal and elsewhere."""

import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from common.types import ActorState
from learner.reporting.display import Display, LiveDisplay, StepReport, make_display, sparkline
from learner.reporting.held_out import REWARD
from learner.rollouts.members import Member
from tests.helpers.fakes import FakeActor

REPORT = StepReport(12, 0.4321, 512.4, 0.5, 4.8e-7, 2.5)


def members() -> list[Member]:
    clients = [FakeActor(f"10.0.0.{i}:50051").connect() for i in range(2)]
    serving = Member(clients[0].address, clients[0], 4, "a", ActorState.SERVING, 12, in_flight=3)
    return [serving, Member(clients[1].address, clients[1], 4, reason="refused")]


def test_plain_is_one_line_per_event(tmp_path: Path) -> None:
    stream = io.StringIO()
    with make_display(name="digits", total_steps=200, run_dir=tmp_path, stream=stream) as display:
        assert type(display) is Display
        display.watch_actors(members)
        display.accuracy(0, 0.314)
        display.step(REPORT)
        display.note("actor 10.0.0.1:50051 left: refused")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == f"digits: 200 steps, run folder {tmp_path}"
    assert lines[1] == "step    0/200  held-out accuracy 31.4%"
    for part in (
        "step   12/200",
        "reward 0.432",
        "512 completions/s",
        "staleness 0.50",
        "parity 4.8e-07",
        "actors 1/2",
    ):
        assert part in lines[2]
    assert lines[3] == "actor 10.0.0.1:50051 left: refused"


@pytest.mark.parametrize("plain", [True, False])
def test_a_weighted_sum_is_shown_as_a_reward(tmp_path: Path, plain: bool) -> None:
    stream = io.StringIO()
    display = make_display(name="x", total_steps=9, run_dir=tmp_path, plain=plain, stream=stream, held_out=REWARD)
    display.accuracy(3, 1.25)
    if isinstance(display, LiveDisplay):
        Console(file=stream, width=110).print(display._render())
    assert re.search(r"held-out reward +1\.250", stream.getvalue())
    assert "accuracy" not in stream.getvalue()


def test_the_panel_shows_everything(tmp_path: Path) -> None:
    stream = io.StringIO()
    display = make_display(name="digits", total_steps=200, run_dir=tmp_path, plain=False, stream=stream)
    assert isinstance(display, LiveDisplay)
    display.watch_actors(members)
    display.phase("training")
    console = Console(file=io.StringIO(), width=110)
    console.print(display._render())  # before the first step
    display.accuracy(0, 0.314)
    display.accuracy(10, 0.622)
    display.step(REPORT)
    console = Console(file=io.StringIO(), width=110)
    console.print(display._render())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("step 12/200", "training", "0.432", "62.2%", "▁█", "512", "0.50", "4.8e-07", "version 12", "3 groups"):
        assert part in text
    assert re.search(r"actor 10\.0\.0\.0:50051\s+serving", text)
    assert re.search(r"actor 10\.0\.0\.1:50051\s+unreachable", text)


def test_live_starts_and_stops_and_keeps_notes(tmp_path: Path) -> None:
    stream = io.StringIO()
    with make_display(name="digits", total_steps=5, run_dir=tmp_path, plain=False, stream=stream) as display:
        display.note("actor two joined")
        display.step(REPORT)
    assert "actor two joined" in stream.getvalue()


def test_sparkline() -> None:
    assert sparkline([], 5) == ""
    assert sparkline([1.0, 1.0], 5) == "▁▁"
    assert sparkline([9.0, 0.0, 0.5, 1.0], 3) == "▁▅█"


@pytest.mark.parametrize(("uniform", "shown"), [(0.49, False), (0.94, True)])
def test_many_groups_that_teach_nothing_are_shown(tmp_path: Path, uniform: float, shown: bool) -> None:
    stream = io.StringIO()
    report = dataclasses.replace(REPORT, uniform=uniform)
    with make_display(name="digits", total_steps=200, run_dir=tmp_path, stream=stream) as display:
        display.step(report)
    assert ("uniform 94%" in stream.getvalue()) is shown
    live = make_display(name="digits", total_steps=200, run_dir=tmp_path, plain=False, stream=io.StringIO())
    assert isinstance(live, LiveDisplay)
    live.step(report)
    console = Console(file=io.StringIO(), width=110)
    console.print(live._render())
    assert ("uniform groups" in console.file.getvalue()) is shown  # type: ignore[attr-defined]
