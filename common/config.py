"""Typed configuration: one YAML file and `key.path=value` overrides, validated in one place.

Imports no torch, so that `--help` and a wrong key answer at once.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
import yaml


class ConfigError(ValueError):
    """A user's mistake in the configuration: `__main__` prints it as one line and exits with its code."""

    exit_code = 2


class NotYet(ConfigError):  # noqa: N818 - as ours are named
    """What the configuration names is not there, and may come: `python -m learner` is to be tried again."""

    exit_code = 1


class Config(pydantic.BaseModel):
    """Base of every configuration class: frozen, and a key that it does not know is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=Config)
# Of a message about unknown keys.
_MAX_LINES = 10


def load_config(cls: type[C], path: Path | None, overrides: list[str], flags: Mapping[str, object] | None = None) -> C:
    """Read `path` (YAML; None for nothing but defaults), then apply `flags` and `overrides` as `optimizer.lr=3e-4`.

    `flags` are top-level keys from the command line; None stands for a flag that was not given. Values of overrides
    are YAML. Raises ConfigError: one line with the file, the key path and what is wrong; one for each unknown key.
    """
    values = _read(path) if path is not None else {}
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    for override in overrides:
        _override(cls, values, override)
    return parse_config(cls, values, str(path) if path is not None else "configuration")


def parse_config(cls: type[C], values: dict[str, Any], source: str) -> C:
    """Validate plain values; `source` names them in errors. Raises ConfigError."""
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {line}" for line in _explain(cls, error))) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold keys and values at its top level, not a {type(values).__name__}")
    return values


def _override(cls: type[Config], values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override!r}: an override is written key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not YAML") from None
    *parents, leaf = key.split(".")
    section = _class_at(cls, parents)
    if not text and section and leaf in section.model_fields and section.model_fields[leaf].annotation is str:
        value = ""  # and not YAML's null
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, it has no keys")
        values = child
    values[leaf] = value


def _explain(cls: type[Config], error: pydantic.ValidationError) -> list[str]:
    """Unknown keys, a line each: they are the cause of most other mistakes. Or else the first mistake, in one line."""
    problems = error.errors(include_url=False)
    unknown = [problem["loc"] for problem in problems if problem["type"] == "extra_forbidden"]
    if unknown:
        lines = [_unknown(cls, path) for path in unknown[:_MAX_LINES]]
        return [*lines, f"{len(unknown) - len(lines)} more unknown keys"] if unknown[_MAX_LINES:] else lines
    first, path = problems[0], ".".join(map(_printable, problems[0]["loc"]))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    # The input of what checks a whole section would be all of it.
    is_said = first["type"] == "missing" or (first["type"] == "value_error" and isinstance(first["input"], dict))
    shown = "" if is_said else f" (got {first['input']!r})"
    return [f"{path or 'value'}: {first['msg'].removeprefix('Value error, ')}{shown}{more}"]


def _unknown(cls: type[Config], path: tuple[int | str, ...]) -> str:
    known = _keys_at(cls, path[:-1])
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
    return f"{'.'.join(map(_printable, path))}: unknown key; {hint}"


def _printable(key: int | str) -> str:
    """A key of a YAML file, which may hold anything."""
    return str(key) if str(key).isprintable() else repr(key)


def _keys_at(cls: type[Config], path: Sequence[int | str]) -> list[str]:
    """The keys that the class at `path` below `cls` knows."""
    section = _class_at(cls, path)
    return sorted(section.model_fields) if section else []


def _class_at(cls: type[Config], path: Sequence[int | str]) -> type[Config] | None:
    """The class of the section at `path` below `cls`; None if there is none."""
    current: type[Config] | None = cls
    for part in path:
        annotation = current.model_fields[part].annotation if current and part in current.model_fields else None
        classes = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        current = next((kind for kind in classes if issubclass(kind, Config)), None)
    return current
