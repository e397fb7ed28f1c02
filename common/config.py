"""Typed configuration: one YAML file and `key.path=value` overrides, validated in one place.

Imports no torch, so that `--help` and a wrong key answer at once.
"""

import difflib
from collections.abc import Mapping
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


def load_config(cls: type[C], path: Path | None, overrides: list[str], flags: Mapping[str, object] | None = None) -> C:
    """Read `path` (YAML; None for nothing but defaults), then apply `flags` and `overrides` as `optimizer.lr=3e-4`.

    `flags` are top-level keys from the command line; None stands for a flag that was not given. Values of overrides
    are YAML. Raises ConfigError: one line with the file, the key path and what is wrong.
    """
    values = _read(path) if path is not None else {}
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    for override in overrides:
        _override(values, override)
    return parse_config(cls, values, str(path) if path is not None else "configuration")


def parse_config(cls: type[C], values: dict[str, Any], source: str) -> C:
    """Validate plain values; `source` names them in errors. Raises ConfigError."""
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(cls, error)}") from None


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


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override!r}: an override is written key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not YAML") from None
    *parents, leaf = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, it has no keys")
        values = child
    values[leaf] = value


def _explain(cls: type[Config], error: pydantic.ValidationError) -> str:
    """The first mistake (unknown keys first: they are the cause of most others), in one line."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    first, path = problems[0], ".".join(map(_printable, problems[0]["loc"]))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] != "extra_forbidden":
        shown = "" if first["type"] == "missing" else f" (got {first['input']!r})"
        return f"{path or 'value'}: {first['msg'].removeprefix('Value error, ')}{shown}{more}"
    known = _keys_at(cls, first["loc"][:-1])
    close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
    return f"{path}: unknown key; {hint}{more}"


def _printable(key: int | str) -> str:
    """A key of a YAML file, which may hold anything."""
    return str(key) if str(key).isprintable() else repr(key)


def _keys_at(cls: type[Config], path: tuple[int | str, ...]) -> list[str]:
    """The keys that the class at `path` below `cls` knows."""
    current: type[Config] | None = cls
    for part in path:
        annotation = current.model_fields[part].annotation if current and part in current.model_fields else None
        classes = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        current = next((kind for kind in classes if issubclass(kind, Config)), None)
    return sorted(current.model_fields) if current else []
