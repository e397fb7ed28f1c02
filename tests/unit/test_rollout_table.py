"""docs/rollouts.md names tests; they exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_the_table_names_exists() -> None:
    text = (ROOT / "docs" / "rollouts.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))
    assert len(named) > 25
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [f"{file}::{test}" for file, test in sorted(named) if f"def {test}(" not in files.get(file, "")]
    assert missing == []


def test_every_row_that_is_taken_has_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "rollouts.md").read_text().splitlines() if line.startswith("| ")]
    for row in rows:
        *_, ours, test = (cell.strip() for cell in row.strip("|").split("|"))
        if ours != "Outrider" and not ours.startswith("not taken"):
            assert test, row
