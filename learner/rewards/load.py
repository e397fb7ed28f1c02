"""Reward functions by name: "package.module:function", or an entry point of the group "outrider.rewards".

A package offers its rewards under short names in its pyproject.toml, as this one does:

    [project.entry-points."outrider.rewards"]
    exact_match = "learner.rewards.builtin.exact_match:exact_match"
"""

import contextlib
import importlib
import importlib.metadata
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.config import ConfigError, NotYet
from learner.rewards.base import GroupReward
from learner.rewards.forms import as_group_reward

ENTRY_POINTS = "outrider.rewards"


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put back what modules of the user, which the block imports, change of this process: directory, signals."""
    directory = Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        os.chdir(directory)
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def load_object(path: str, what: str) -> object:
    """Import "module:name". Raises `ConfigError`, one line that begins with `what`."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"{what}: {path!r} is not an import path; write it as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{what}: cannot import {module_name!r} ({error}); is its folder on PYTHONPATH?") from None
    except ConfigError:
        raise
    except SystemExit:
        raise ConfigError(
            f"{what}: {module_name!r} ends the process when it is imported (sys.exit); "
            'what is a program in it belongs below `if __name__ == "__main__":`'
        ) from None
    except Exception as error:
        raise mistake(f"{what}: cannot import {module_name!r}", error) from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigError(f"{what}: module {module_name!r} has no {name!r}") from None


def mistake(what: str, error: Exception) -> ConfigError:
    """What a user's own code has raised, in one line with its place; of an OSError it may be gone the next time."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    place = traceback.extract_tb(error.__traceback__)[-1]
    # The place of a SyntaxError is in its text.
    where = "" if isinstance(error, SyntaxError) else f" ({Path(place.filename).name}, line {place.lineno})"
    return (NotYet if isinstance(error, OSError) else ConfigError)(f"{what}: {said}{where}")


def load_rewards(names: Sequence[str]) -> tuple[GroupReward, ...]:
    """The rewards of these names. Raises `ConfigError` for the first that cannot be used."""
    return tuple(load_reward(name) for name in names)


def load_reward(name: str) -> GroupReward:
    """The reward of this name.

    Raises `ConfigError` if it cannot be found, is no function, or wants an argument that does not exist.
    """
    function = load_object(_import_path(name), "reward")
    if not callable(function):
        raise ConfigError(f"reward: {name!r} is a {type(function).__name__}, not a function")
    return as_group_reward(function, name)


def _import_path(name: str) -> str:
    if ":" in name:
        return name
    known = importlib.metadata.entry_points(group=ENTRY_POINTS)
    paths = sorted({entry.value for entry in known if entry.name == name})
    if not paths:
        raise ConfigError(
            f"reward: {name!r} is neither an import path (package.module:function) "
            f"nor one of {', '.join(sorted(known.names)) or 'the installed rewards: there are none'}"
        )
    if len(paths) > 1:
        raise ConfigError(f"reward: several packages have a {name!r}; write {' or '.join(paths)}")
    return paths[0]
