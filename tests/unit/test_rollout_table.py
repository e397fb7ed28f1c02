"""docs/rollouts.md names tests; they exist, and the slow ones that CI leaves out are marked."""

import ast
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


def test_what_ci_leaves_out_is_marked() -> None:
    marked = re.findall(r"`(test_\w+\.py)::(test_\w+)`(†?)", (ROOT / "docs" / "rollouts.md").read_text())
    files = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    ci = (ROOT / ".ci" / "run").read_text()
    for file, test, mark in marked:
        assert bool(mark) == (is_slow(files[file], test) and file not in ci), f"{file}::{test}"


def is_slow(path: Path, test: str) -> bool:
    """Whether it, or its whole file, has the marker."""
    marks: list[ast.expr] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == test:
            marks += node.decorator_list
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            marks.append(node.value)
    return any("pytest.mark.slow" in ast.unparse(mark) for mark in marks)


def test_every_row_that_is_taken_has_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "rollouts.md").read_text().splitlines() if line.startswith("| ")]
    for row in rows:
        *_, ours, test = (cell.strip() for cell in row.strip("|").split("|"))
        if ours != "Outrider" and not ours.startswith("not taken"):
            assert test, row
