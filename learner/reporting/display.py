"""What the user sees while a run goes on: one live panel on a terminal, one line per step anywhere else.

Logs go to a file of the run folder, so the display has standard output for itself. Any thread may call it.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.types import ActorState
from learner.reporting.held_out import ACCURACY, HeldOut
from learner.reporting.summary import format_duration

# A smaller share of dropped groups is not shown.
_MANY_DROPPED = 0.05
# Nor one of groups with equal rewards.
_MANY_UNIFORM = 0.5
_BARS = "▁▂▃▄▅▆▇█"
_STATE_STYLE = {
    ActorState.SERVING: "green",
    ActorState.FAILED: "red",
    ActorState.DRAINING: "yellow",
    ActorState.PAUSED: "yellow",
}


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished step. `reward` is the mean of its completions, `staleness` that of its groups, in versions."""

    step: int
    reward: float
    completions_per_s: float
    staleness: float
    parity: float | None
    """Largest logprob difference on on-policy tokens; None without such tokens."""
    step_s: float
    loss: float | None = None
    entropy: float | None = None
    dropped: float = 0.0
    """Share of the groups since the step before that were dropped."""
    uniform: float = 0.0
    """Share of its groups whose rewards are all equal, which teach nothing."""


class ActorView(Protocol):
    """What is shown of an actor: `learner.rollouts.fleet.Member` has it."""

    @property
    def address(self) -> str: ...  # noqa: D102
    @property
    def state(self) -> ActorState | None: ...  # noqa: D102
    @property
    def version(self) -> int: ...  # noqa: D102
    @property
    def in_flight(self) -> int: ...  # noqa: D102


class Display:
    """Remembers what happened and shows it, one plain line for each step. The base of `LiveDisplay`.

    Use it as a context manager. `watch_actors` gives it something to ask for the actors' states.
    """

    def __init__(
        self,
        *,
        name: str,
        total_steps: int,
        run_dir: Path,
        stream: TextIO | None = None,
        held_out: HeldOut = ACCURACY,
    ) -> None:
        self._name = name
        self._total_steps = total_steps
        self._run_dir = run_dir
        self._stream = stream or sys.stdout
        self.held_out = held_out
        """How `accuracy` is told."""
        self._lock = threading.RLock()
        self._started = time.monotonic()
        self._report: StepReport | None = None
        self._rewards: list[float] = []
        self._accuracies: list[tuple[int, float]] = []
        self._phase = "starting"
        self._actors: Callable[[], Sequence[ActorView]] = tuple

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to show."""
        self._print(f"{self._name}: {self._total_steps} steps, run folder {self._run_dir}")

    def stop(self) -> None:
        """Show nothing more; what was printed stays."""

    def watch_actors(self, actors: Callable[[], Sequence[ActorView]]) -> None:
        """Show these, asked anew each time (`fleet.members`)."""
        self._actors = actors

    def phase(self, text: str) -> None:
        """What goes on now, as "waiting for actors", "evaluating", "training"."""
        with self._lock:
            self._phase = text

    def note(self, text: str) -> None:
        """One line that stays, as "actor 127.0.0.1:50052 left: connection refused"."""
        with self._lock:
            self._print(text)

    def accuracy(self, step: int, value: float) -> None:
        """Mean reward of the held-out rows after `step` steps."""
        with self._lock:
            self._accuracies.append((step, value))
            self._print(f"step {step:>4}/{self._total_steps}  {self.held_out.name} {self.held_out.show(value)}")

    def step(self, report: StepReport) -> None:
        """A step is done."""
        with self._lock:
            self._report = report
            self._rewards.append(report.reward)
            self._show_step(report)

    def _show_step(self, report: StepReport) -> None:
        serving = sum(actor.state is ActorState.SERVING for actor in self._actors())
        dropped = f"dropped {report.dropped:.0%}  " if report.dropped >= _MANY_DROPPED else ""
        uniform = f"uniform {report.uniform:.0%}  " if report.uniform >= _MANY_UNIFORM else ""
        self._print(
            f"step {report.step:>4}/{self._total_steps}  reward {report.reward:.3f}  "
            f"{report.completions_per_s:>5.0f} completions/s  staleness {report.staleness:.2f}  "
            f"parity {_scientific(report.parity)}  {dropped}{uniform}"
            f"actors {serving}/{len(self._actors())}  {self._elapsed()}"
        )

    def _elapsed(self) -> str:
        return format_duration(time.monotonic() - self._started)

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class LiveDisplay(Display):
    """A panel that is redrawn in place; notes scroll above it."""

    def __init__(
        self,
        *,
        name: str,
        total_steps: int,
        run_dir: Path,
        stream: TextIO | None = None,
        held_out: HeldOut = ACCURACY,
    ) -> None:
        super().__init__(name=name, total_steps=total_steps, run_dir=run_dir, stream=stream, held_out=held_out)
        self._console = Console(file=self._stream)
        self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self._render)

    def start(self) -> None:
        """Begin to draw."""
        self._live.start()

    def stop(self) -> None:
        """Leave the last picture where it is."""
        self._live.stop()

    def note(self, text: str) -> None:
        """Print a line above the panel."""
        self._live.console.print(Text(text, style="dim"))

    def accuracy(self, step: int, value: float) -> None:
        """See `Display.accuracy`."""
        with self._lock:
            self._accuracies.append((step, value))

    def _show_step(self, report: StepReport) -> None:
        pass  # the panel refreshes itself

    def _render(self) -> RenderableType:
        with self._lock:
            report = self._report
            done = report.step if report else 0
            head = Table.grid(padding=(0, 1), expand=True)
            head.add_column(no_wrap=True)
            head.add_column(ratio=1)
            head.add_column(no_wrap=True, justify="right")
            head.add_row(
                f"step {done}/{self._total_steps}",
                ProgressBar(total=max(1, self._total_steps), completed=done),
                f"{self._phase}  {self._elapsed()}",
            )
            title = Text.assemble((self._name, "bold"), f"  {self._run_dir}")
            return Panel(Group(head, self._numbers(report), self._fleet()), title=title, title_align="left")

    def _numbers(self, report: StepReport | None) -> Table:
        table = Table.grid(padding=(0, 2))
        history = [value for _, value in self._accuracies]
        table.add_row("reward", f"{report.reward:.3f}" if report else "-", sparkline(self._rewards, 40))
        latest = self.held_out.show(history[-1]) if history else "-"
        table.add_row(self.held_out.name, latest, sparkline(history, 40))
        table.add_row("completions/s", f"{report.completions_per_s:,.0f}" if report else "-")
        table.add_row("staleness", f"{report.staleness:.2f}" if report else "-", "versions, mean of the last step")
        parity = _scientific(report.parity) if report else "-"
        if report and report.dropped >= _MANY_DROPPED:
            table.add_row("dropped groups", f"{report.dropped:.0%}", "of those since the step before")
        if report and report.uniform >= _MANY_UNIFORM:
            table.add_row(
                "uniform groups", f"{report.uniform:.0%}", "of the last step: equal rewards, nothing to learn"
            )
        table.add_row("parity", parity, "largest logprob difference, actor and learner")
        return table

    def _fleet(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for actor in self._actors():
            state = (
                Text("unreachable", "red")
                if actor.state is None
                else Text(actor.state.value.replace("_", " "), _STATE_STYLE.get(actor.state, ""))
            )
            version = f"version {actor.version}" if actor.version >= 0 else ""
            table.add_row(f"actor {actor.address}", state, version, f"{actor.in_flight} groups")
        return table


def make_display(
    *,
    name: str,
    total_steps: int,
    run_dir: Path,
    plain: bool | None = None,
    stream: TextIO | None = None,
    held_out: HeldOut = ACCURACY,
) -> Display:
    """The live panel on a terminal, plain lines elsewhere; `plain` decides it."""
    if plain is None:
        plain = not (stream or sys.stdout).isatty()
    kind = Display if plain else LiveDisplay
    return kind(name=name, total_steps=total_steps, run_dir=run_dir, stream=stream, held_out=held_out)


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars between the smallest and the largest of them."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in shown)


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
