from pathlib import Path
from typing import Self

import pydantic
import pytest

from common.config import Config, ConfigError, load_config


class Optimizer(Config):
    lr: float = pydantic.Field(1e-3, gt=0)
    weight_decay: float = 0.0


class Data(Config):
    held_out: str = "rows"
    listen: str | None = "here"


class Run(Config):
    name: str = "run"
    steps: int
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    teacher: Optimizer | None = None


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_overrides_win_over_flags_over_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path / "run.yaml", "name: file\nsteps: 5\noptimizer: {lr: 0.1, weight_decay: 0.2}\n")
    config = load_config(Run, path, ["optimizer.lr=3e-4", "steps=7"], {"name": "flag", "steps": None})
    assert config == Run(name="flag", steps=7, optimizer=Optimizer(lr=3e-4, weight_decay=0.2))


def test_override_values_are_yaml() -> None:
    config = load_config(Run, None, ["steps=1", "teacher={lr: 0.5}", "name='7'"])
    assert config.teacher == Optimizer(lr=0.5)
    assert config.name == "7"


def test_an_empty_override_of_a_text_is_empty() -> None:
    """As a shell writes it; other keys have YAML's null then."""
    config = load_config(Run, None, ["steps=1", "name=", "data.held_out=", "data.listen=", "teacher="])
    assert config == Run(name="", steps=1, data=Data(held_out="", listen=None))
    assert load_config(Run, None, ["steps=1", "data.held_out=''"]).data.held_out == ""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stpes=3", "steps=1"], "configuration: stpes: unknown key; did you mean steps?"),
        (
            ["steps=1", "optimizer.learning=1"],
            "configuration: optimizer.learning: unknown key; known keys: lr, weight_decay",
        ),
        (["steps=1", "teacher.wd=1"], "configuration: teacher.wd: unknown key; known keys: lr, weight_decay"),
        ([], "configuration: steps: Field required"),
        (["steps=1", "optimizer.lr=-1"], "configuration: optimizer.lr: Input should be greater than 0 (got -1)"),
        (["steps="], "configuration: steps: Input should be a valid integer (got None)"),
        (["steps=1", "data.heldout="], "configuration: data.heldout: unknown key; did you mean held_out?"),
        (["steps=1", "data.held_out=null"], "configuration: data.held_out: Input should be a valid string (got None)"),
        (["steps"], "'steps': an override is written key.path=value"),
        (["steps=1", "optimizer..lr=1"], "'optimizer..lr=1': an override is written key.path=value"),
        # The unknown key alone: it is why the other one is missing.
        (["step=3", "optimizer.lr=-1"], "configuration: step: unknown key; did you mean steps?"),
        (
            ["steps=x", "optimizer.lr=-1"],
            "configuration: steps: Input should be a valid integer, unable to parse string as an integer (got 'x')"
            " (and 1 more)",
        ),
        (["steps=1", "name.first=x"], "configuration: name: Input should be a valid string (got {'first': 'x'})"),
        (["steps=1", "steps.more=2"], "'steps.more=2': steps is a value, it has no keys"),
        (["steps={"], "'steps={': the value is not YAML"),
    ],
)
def test_a_mistake_is_one_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(Run, None, overrides)
    assert str(raised.value) == expected


def test_each_unknown_key_has_a_line() -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(Run, None, ["steps=x", "optimizer.lrr=1", "nmae=x"])
    assert sorted(str(raised.value).splitlines()) == [
        "configuration: nmae: unknown key; did you mean name?",
        "configuration: optimizer.lrr: unknown key; did you mean lr?",
    ]
    with pytest.raises(ConfigError) as raised:
        load_config(Run, None, [f"optimizer.lr{number}=1" for number in range(13)])
    assert len(str(raised.value).splitlines()) == 11
    assert str(raised.value).endswith("\nconfiguration: 3 more unknown keys")


def test_what_is_wrong_with_a_section_does_not_print_the_section() -> None:
    class Section(Config):
        low: int = 1

        @pydantic.model_validator(mode="after")
        def _check(self) -> Self:
            raise ValueError("low is too high")

    class Whole(Config):
        section: Section

    with pytest.raises(ConfigError) as raised:
        load_config(Whole, None, ["section.low=5"])
    assert str(raised.value) == "configuration: section: low is too high"


def test_file_mistakes_name_the_file(tmp_path: Path) -> None:
    missing = tmp_path / "no.yaml"
    with pytest.raises(ConfigError, match=r"no\.yaml: No such file or directory; give the path of a YAML file"):
        load_config(Run, missing, [])
    with pytest.raises(ConfigError, match=r"bad\.yaml: not YAML: .*line 1") as raised:
        load_config(Run, _write(tmp_path / "bad.yaml", "a: [1"), [])
    assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"list\.yaml: must hold keys and values at its top level, not a list"):
        load_config(Run, _write(tmp_path / "list.yaml", "- 1"), [])
    with pytest.raises(ConfigError, match=r"typo\.yaml: optimiser: unknown key; did you mean optimizer\?"):
        load_config(Run, _write(tmp_path / "typo.yaml", "steps: 1\noptimiser: {}"), [])


def test_config_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        Run(steps=1).steps = 2  # type: ignore[misc]
