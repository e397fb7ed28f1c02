"""`python -m tests.injection`: the fault matrix with real processes, as a table. Needs root, `ip`, `tc` and `nsenter`.

Some of it: `python -m tests.injection --cells actor/stage/kill 'rank-*/between/*'`. `--list` says which there are. With
`--results FILE` what is in there already is in the table too, so that it can be made in parts. `--engine vllm` is a
sample with real actors; after each cell their logprobs must be the learner's.
"""

import argparse
import fnmatch
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from examples.digits.model import build_model
from tests.helpers.digits_engine import DigitsPrompt
from tests.injection.actor import PROMPT
from tests.injection.job import NODES, Job
from tests.injection.machines import Machines
from tests.injection.matrix import Cell, Outcome, cells, run
from tests.injection.setups import SETUPS, Setup
from tests.manifests.runner import kernel


def main() -> int:
    """The exit code is 1 if a cell does not recover."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.injection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=SETUPS, default="fake", help="of the actors; vllm: some of the cells")
    parser.add_argument("--cells", nargs="*", help="victim/phase/kind, with * and ?")
    parser.add_argument("--results", type=Path, help="add the outcomes to this file")
    parser.add_argument("--list", action="store_true", help="print the cells and do nothing")
    parser.add_argument("--keep", type=Path, help="leave logs and checkpoints in this directory")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # so that nothing is left behind
        signal.signal(number, signal.default_int_handler)
    setup = SETUPS[options.engine]
    patterns = options.cells or setup.cells
    chosen = [cell for cell in cells() if any(fnmatch.fnmatch(str(cell), pattern) for pattern in patterns)]
    if options.list or not chosen:
        print("\n".join(map(str, chosen or cells())))
        return 0 if chosen else 2
    directory = options.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    directory.mkdir(parents=True, exist_ok=True)
    results = options.results or directory / "results"
    failed: list[Cell] = []
    try:
        for outcome in _run(setup, chosen, directory, failed):
            with results.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        print("\n".join(table([read(line) for line in results.read_text().splitlines()])))
    finally:
        if options.keep is None:
            shutil.rmtree(directory)
    return 1 if failed else 0


def _run(setup: Setup, chosen: Sequence[Cell], directory: Path, failed: list[Cell]) -> Iterator[Outcome]:
    """One job, in which they happen one after another; after one that it does not recover from it is started over."""
    kernel.unshare(kernel.CLONE_NEWNET)
    model_dir = build_model(directory / "model", seed=0)
    (model_dir / PROMPT).write_text(json.dumps(asdict(DigitsPrompt.of(model_dir))))
    with Machines([*setup.actors, *NODES], directory) as machines:
        job = Job(setup, machines, directory, model_dir)
        for actor in job.actors:
            job.start_actor(actor)
        for i, cell in enumerate(sorted(chosen, key=lambda cell: cell.num_nodes), 1):
            started_at = time.monotonic()
            try:
                outcome = run(job, cell)
            except TimeoutError as error:
                failed.append(cell)
                print(f"[{i}/{len(chosen)}] {cell} does not recover: {error}", flush=True)
                job.start_over(cell.num_nodes)
                continue
            print(f"[{i}/{len(chosen)}] {_line(outcome)} ({time.monotonic() - started_at:.0f} s)", flush=True)
            yield outcome
        job.stop_learner()
        if any(cell.rank is not None for cell in chosen):
            job.finish(num_steps=3)
        num_steps, num_dropped = job.check_learned_once()
    print(f"{num_steps} steps: each group was trained once, {num_dropped} were dropped and counted\n")


def read(line: str) -> Outcome:
    """One line of a file of results."""
    fields = json.loads(line)
    return Outcome(**{**fields, "cell": Cell(**fields["cell"])})


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """In Markdown, in the order of the matrix; of a cell that came more than once, the last."""
    by_cell = {outcome.cell: outcome for outcome in outcomes}
    yield "| victim | phase | fault | the others go on after | noticed after | all is well again |"
    yield "|---|---|---|---|---|---|"
    for cell in cells():
        if cell in by_cell:
            outcome = by_cell[cell]
            figures = [_seconds(value) for value in (outcome.released_s, outcome.noticed_s, outcome.back_s)]
            yield "| " + " | ".join([cell.victim, cell.phase, cell.kind, *figures]) + " |"


def _line(outcome: Outcome) -> str:
    diff = outcome.parity_max_abs_diff
    parity = "" if diff is None else f", logprobs differ by {diff:.1e} then"
    return f"{outcome.cell}: others go on after {outcome.released_s:.1f} s, back after {outcome.back_s:.1f} s{parity}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
