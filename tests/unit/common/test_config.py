from pathlib import Path

import pydantic
import pytest

from common.config import Config, ConfigError, load_config


class Optimizer(Config):
    lr: float = pydantic.Field(1e-3, gt=0)
    weight_decay: float = 0.0


class Run(Config):
    name: str = "run"
    steps: int
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
        (["steps"], "'steps': an override is written key.path=value"),
        (["steps=1", "name.first=x"], "configuration: name: Input should be a valid string (got {'first': 'x'})"),
        (["steps=1", "steps.more=2"], "'steps.more=2': steps is a value, it has no keys"),
        (["steps={"], "'steps={': the value is not YAML"),
    ],
)
def test_a_mistake_is_one_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(Run, None, overrides)
    assert str(raised.value) == expected


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
