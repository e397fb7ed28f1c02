"""docs/verl.md: every key that it names as ours is one."""

import re
from pathlib import Path

import pydantic

from learner.config import LearnerConfig


def test_our_column_names_settings_that_exist() -> None:
    rows = [line.split("|")[1:4] for line in Path("docs/verl.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    named = [key for _, ours, note in rows for key in re.findall(r"`([a-z_]+\.[a-z_]+)`", ours + note)]
    for key in named:
        section, _, name = key.partition(".")
        if section == "vllm":
            continue  # of an actor, see actor/config.py
        field = LearnerConfig.model_fields[section].annotation
        assert isinstance(field, type)
        assert issubclass(field, pydantic.BaseModel)
        assert name in field.model_fields, key
