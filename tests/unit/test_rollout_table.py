"""docs/rollouts.md names tests; they exist, and slow ones that CI leaves out are marked. It names all that vLLM has."""

import ast
import inspect
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import BeamSearchParams

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


@pytest.mark.parametrize(
    ("section", "classes", "others"),
    [
        ("Sampling", (SamplingParams, BeamSearchParams), {"BeamSearchParams", "structural_tag"}),
        ("Results", (RequestOutput, CompletionOutput), {"mm_placeholders"}),
    ],
)
def test_the_column_of_vllm_is_complete(section: str, classes: Sequence[type], others: set[str]) -> None:
    text = (ROOT / "docs" / "rollouts.md").read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    cells = [row.split("|")[2] for row in text.splitlines() if row.startswith("| ")]
    named = {name for cell in cells[1:] for code in re.findall(r"`(.*?)`", cell) for name in re.findall(r"\w+", code)}
    fields = {name for each in classes for name in inspect.signature(each).parameters if not name.startswith("_")}
    assert named == fields - {"kwargs"} | others
