"""docs/verl.md: every key that it names as ours is one, and what has no counterpart says what happens instead."""

import re
from pathlib import Path

import pydantic

from actor.config import VllmConfig
from learner.config import LearnerConfig

ROWS = [
    [cell.strip() for cell in line.split("|")[1:4]]
    for line in Path("docs/verl.md").read_text().splitlines()
    if line.startswith("| `")
]


def test_our_column_names_settings_that_exist() -> None:
    assert len(ROWS) > 45
    named = [key for _, ours, note in ROWS for key in re.findall(r"`([a-z_]+\.[a-z_]+)`", ours + note)]
    for key in named:
        section, _, name = key.partition(".")
        field = VllmConfig if section == "vllm" else LearnerConfig.model_fields[section].annotation
        assert isinstance(field, type)
        assert issubclass(field, pydantic.BaseModel)
        assert name in field.model_fields, key


def test_our_column_has_settings_of_the_top_level_that_exist() -> None:
    named = {key for _, ours, _ in ROWS for key in re.findall(r"`([a-z_]+)`", ours)}
    assert named == {"resume", "run_dir", "runs_dir", "trackers"}
    assert named <= set(LearnerConfig.model_fields)


def test_a_key_without_a_counterpart_says_what_happens_instead() -> None:
    none = {theirs: note for theirs, ours, note in ROWS if ours in ("", "none")}
    assert any("top_p" in theirs for theirs in none)
    assert all(len(note.split()) >= 2 for note in none.values()), none
