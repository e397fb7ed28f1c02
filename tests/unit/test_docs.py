"""The documents: their links lead somewhere, what they name is there, and their prose fits a page."""

import re
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from actor.config import ActorConfig
from common.config import Config
from learner.config import LearnerConfig

ROOT = Path(__file__).resolve().parents[2]
PARSER = MarkdownIt("commonmark").enable("table")
# Keys of each section of a configuration.
SECTIONS = {
    name: set(field.annotation.model_fields)
    for config in (LearnerConfig, ActorConfig)
    for name, field in config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Config)
}
# Columns of a line of prose. What has no space in it cannot be broken.
WIDTH = 120


def _tracked(pattern: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, check=True, capture_output=True, text=True)
    return listed.stdout.split()


DOCUMENTS = _tracked("*.md")
# Settings of others: a key of verl's, and the group of vLLM's entry points.
OTHERS = {"data.apply_chat_template_kwargs", "vllm.general_plugins"}
FOLDERS = ("actor", "benchmarks", "common", "deploy", "docs", "examples", "learner", "proto", "tests")


def _inline(tokens: list[Token]) -> Iterator[Token]:
    return (child for token in tokens for child in token.children or ())


def _targets(text: str) -> list[str]:
    """Where links and images of a document lead."""
    attributes = (
        child.attrGet("href" if child.type == "link_open" else "src")
        for child in _inline(PARSER.parse(text))
        if child.type in {"link_open", "image"}
    )
    return [str(target) for target in attributes]


def _anchors(text: str) -> set[str]:
    """Of the headings, by GitHub's rules: letters, digits, `_`, `-` stay; equal ones are numbered from the 2nd on."""
    tokens, anchors, seen = PARSER.parse(text), set[str](), dict[str, int]()
    for heading, title in pairwise(tokens):
        if heading.type == "heading_open":
            shown = "".join(child.content for child in _inline([title]))
            anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
            anchors.add(f"{anchor}-{seen[anchor]}" if anchor in seen else anchor)
            seen[anchor] = seen.get(anchor, 0) + 1
    return anchors


def _broken(document: Path) -> list[str]:
    broken = []
    for target in _targets(document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and anchor not in _anchors(file.read_text())):
            broken.append(target)
    return broken


def _too_long(text: str) -> list[int]:
    """Numbers of the lines of prose above `WIDTH`; not of tables, code and headings, which cannot be wrapped."""
    tokens, lines = PARSER.parse(text), text.splitlines()
    prose = [token.map for token in tokens if token.type == "paragraph_open" and token.map]
    return [
        number + 1
        for begin, end in prose
        for number in range(begin, end)
        if len(lines[number]) > WIDTH and " " in lines[number].strip()
    ]


def _code(text: str) -> str:
    """What a document has between backticks, in a line or in a block."""
    tokens = PARSER.parse(text)
    inline = [child.content for child in _inline(tokens) if child.type == "code_inline"]
    return "\n".join([*inline, *(token.content for token in tokens if token.type == "fence")])


def _missing(text: str) -> list[str]:
    """Files of this repository, modules, `make` targets and settings that code names, and that are not there."""
    code = _code(text)
    paths = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", code)
    modules = [module.replace(".", "/") for module in re.findall(r"python -m ((?:\w+\.)*\w+)", code)]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    keys = re.findall(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})\.[a-z_]+)(?![\w/(.])", code)
    return [
        *(path for path in paths if not (ROOT / path).exists()),
        *(
            module
            for module in modules
            if not any((ROOT / f"{module}{end}").exists() for end in (".py", "/__main__.py"))
        ),
        *(target for target in re.findall(r"\bmake ([a-z][a-z-]+)", code) if target not in targets),
        *(key for key in keys if key.partition(".")[2] not in SECTIONS[key.partition(".")[0]] | {"py", "proto"}),
    ]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    assert _broken(ROOT / name) == []


# verl's keys have the names of our sections: tests/unit/learner/test_verl_table.py looks at ours beside them.
@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "docs/verl.md"])
def test_what_code_names_is_there(name: str) -> None:
    assert set(_missing((ROOT / name).read_text())) <= OTHERS


def test_what_is_missing_is_found() -> None:
    text = (
        "`learner/gone.py` `learner/run.py` `python -m tests.gone` `make nothing`\n\n```\nmake demo\npython -m actor\n"
        "outrider trainer.total_steps=1 trainer.gone=2 vllm.seed=1\n```\n\nlearner/not/code.py\n"
    )
    assert _missing(text) == ["learner/gone.py", "tests/gone", "nothing", "trainer.gone"]


# A changelog has one line for each entry.
@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_prose_fits_the_width(name: str) -> None:
    assert _too_long((ROOT / name).read_text()) == []


def test_what_is_broken_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# The `run` & co., first\n\n## Again\n\n## Again\n")
    (tmp_path / "this.md").write_text(
        "# Here\n[a](other.md#the-run--co-first) [b](other.md#again-1) [c](#here) [d](https://example.com/x.md#y)\n\n"
        "![e](none.svg) [f](#there) [g](other.md#again-2) `[h](code.md)`\n\n| table |\n|---|\n| [i](gone.md) |\n"
    )
    assert _broken(tmp_path / "this.md") == ["none.svg", "#there", "other.md#again-2", "gone.md"]


def test_what_is_too_long_is_found() -> None:
    long = "word " * 25
    text = f"# {long}\n\nshort\n{long}\n\n- {long}\n\n| {long} |\n|---|\n\n```\n{long}\n```\n\n{'x' * 130}\n"
    assert _too_long(text) == [4, 6]


def test_the_map_of_the_learner_names_each_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().partition("### The learner, room by room\n")[2]
    named = re.findall(r"^\| `([^`]+)` \|", text.partition("\n## ")[0], re.MULTILINE)
    parts = [file.split("/")[1:] for file in _tracked("learner")]
    rooms = {first + "/" * bool(inside) for first, *inside in parts} - {"__init__.py"}
    assert sorted(named) == sorted(rooms)
