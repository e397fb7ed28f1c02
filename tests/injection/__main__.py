"""`python -m tests.injection`: the fault matrix with real processes, as a table. Needs root, `ip`, `tc` and `nsenter`.

Some of it: `python -m tests.injection --cells actor/stage/kill 'rank-*/between/*'`. `--list` says which there are.
"""

import argparse
import fnmatch
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from examples.digits.model import build_model
from tests.injection.job import ACTORS, RANKS, Job
from tests.injection.machines import Machines
from tests.injection.matrix import Cell, Outcome, cells, run
from tests.manifests.runner import kernel


def main() -> int:
    """The exit code is 1 if a cell does not recover."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.injection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="*", default=["*"], help="victim/phase/kind, with * and ?")
    parser.add_argument("--list", action="store_true", help="print the cells and do nothing")
    parser.add_argument("--keep", type=Path, help="leave logs and checkpoints in this directory")
    options = parser.parse_args()
    chosen = [cell for cell in cells() if any(fnmatch.fnmatch(str(cell), pattern) for pattern in options.cells)]
    if options.list or not chosen:
        print("\n".join(map(str, chosen or cells())))
        return 0 if chosen else 2
    directory = options.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        return _run(chosen, directory)
    finally:
        if options.keep is None:
            shutil.rmtree(directory)


def _run(chosen: Sequence[Cell], directory: Path) -> int:
    kernel.unshare(kernel.CLONE_NEWNET)
    model_dir = build_model(directory / "model", seed=0)
    outcomes: list[Outcome] = []
    with Machines([*ACTORS, *RANKS], directory) as machines:
        job = Job(machines, directory, model_dir)
        for actor in job.actors:
            job.start_actor(actor)
        job.start_learner()
        for i, cell in enumerate(chosen, 1):
            started_at = time.monotonic()
            outcomes.append(run(job, cell))
            print(f"[{i}/{len(chosen)}] {_line(outcomes[-1])} ({time.monotonic() - started_at:.0f} s)", flush=True)
        job.finish(num_steps=3)
        num_steps, num_dropped = job.check_learned_once()
    print(f"{num_steps} steps: each group was trained once, {num_dropped} were dropped and counted\n")
    print("| victim | phase | fault | others go on after | noticed after | back after |\n|---|---|---|---|---|---|")
    for outcome in outcomes:
        cell = outcome.cell
        figures = [_seconds(value) for value in (outcome.released_s, outcome.noticed_s, outcome.back_s)]
        print("| " + " | ".join([cell.victim, cell.phase, cell.kind, *figures]) + " |")
    return 0


def _line(outcome: Outcome) -> str:
    return f"{outcome.cell}: others go on after {outcome.released_s:.1f} s, back after {outcome.back_s:.1f} s"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
