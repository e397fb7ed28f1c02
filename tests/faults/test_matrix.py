"""Some of the fault matrix; `python -m tests.injection` runs all of it, and docs/fault-matrix.md has the table."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launched import ROOT
from tests.injection.machines import is_permitted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not is_permitted(), reason="network namespaces need root, `unshare`, `ip` and `tc`"),
]


def recover(directory: Path, *cells: str, engine: str = "fake") -> dict[str, dict[str, Any]]:
    """Have these happen, one after another, to one job; the outcome of each."""
    results = directory / "results"
    options = ["--engine", engine, "--results", str(results), "--cells", *cells]
    command = [sys.executable, "-m", "tests.injection", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
    assert "each group was trained once" in done.stdout
    outcomes = [json.loads(line) for line in results.read_text().splitlines()]
    return {"/".join(outcome["cell"].values()): outcome for outcome in outcomes}


def test_an_actor_dies_or_garbles_a_bucket_in_an_update(tmp_path: Path) -> None:
    cells = ("actor/stage/kill", "actor/stage/corrupt")
    assert [*recover(tmp_path, *cells)] == [*cells]


def test_an_actor_is_stopped_or_cut_off_in_every_phase(tmp_path: Path) -> None:
    outcomes = recover(tmp_path, "actor/*/stop", "actor/*/cut")
    assert len(outcomes) == 8
    # What is noticed late delays its groups and a version, not the run.
    assert max(outcome["noticed_s"] for outcome in outcomes.values()) < 5


def test_a_rank_of_the_learner_dies_or_is_stopped(tmp_path: Path) -> None:
    cells = ("rank-0/stage/kill", "rank-0/commit/stop", "rank-1/gather/kill", "rank-1/between/stop")
    outcomes = recover(tmp_path, *cells)
    assert sorted(outcomes) == sorted(cells)
    # By the watch of the ranks (30 s) and torchrun's patience with a process that takes no signal (30 s).
    assert outcomes["rank-1/between/stop"]["noticed_s"] > 30


def test_actors_with_vllm_die_or_garble_a_bucket_in_an_update(tmp_path: Path) -> None:
    cells = ("actor/stage/kill", "actor/stage/corrupt", "actor/commit/kill")
    outcomes = recover(tmp_path, *cells, engine="vllm")
    assert [*outcomes] == [*cells]
    # Of tokens that each actor has sampled since; a version apart they would differ by a hundred times as much.
    assert all(0 < outcome["parity_max_abs_diff"] <= 1e-4 for outcome in outcomes.values())
