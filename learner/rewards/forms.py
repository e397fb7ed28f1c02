"""Which form a reward function has: told by the names of its arguments.

| form | told by | called |
|---|---|---|
| TRL's | `prompts`, `completions` or `completion_ids` | once for a group, `learner.rewards.batch` |
| verl's | `solution_str` | once for a completion, `learner.rewards.single` |
| ours | neither | once for a completion, `learner.rewards.single` |

Arguments go by name. A function gets those that it names, and all of them if it has a `**rest`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from common.config import ConfigError
from learner.rewards import batch, single
from learner.rewards.base import GroupReward


def as_group_reward(function: Callable[..., Any], name: str) -> GroupReward:
    """The function, as it is called for a group. Raises `ConfigError`, one line with `name`."""
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"reward: {name!r} is a coroutine; rewards run in processes, make it a plain function")
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        raise ConfigError(f"reward: {name!r} does not tell its arguments; wrap it in a Python function") from None
    names = frozenset(parameter.name for parameter in parameters)
    is_batch = bool(names & batch.ARGUMENTS)
    for parameter in parameters:
        _check(parameter, name, is_batch=is_batch)
    takes_rest = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    call = function if takes_rest else functools.partial(_call_with, function, names)
    if is_batch:
        return functools.partial(batch.score_group, call, name)
    return functools.partial(single.score_each, call, name, is_verl=single.VERL in names)


def _check(parameter: inspect.Parameter, name: str, *, is_batch: bool) -> None:
    """Refuse what nobody hands over. Which columns a dataset has is not known here."""
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return
    is_required = parameter.default is parameter.empty
    if parameter.kind is parameter.POSITIONAL_ONLY and (is_required or not is_batch):
        raise ConfigError(f"reward: {name!r} takes {parameter.name!r} by position only; take it by name")
    if not is_required:
        return
    if is_batch and parameter.name in batch.TRAINER_ONLY:
        raise ConfigError(f"reward: {name!r} wants {parameter.name!r}, which only TRL's trainer has; give it a default")
    if not is_batch and parameter.name not in single.KEYWORDS:
        raise ConfigError(
            f"reward: {name!r} wants an argument {parameter.name!r}; it may take, by name: {', '.join(single.KEYWORDS)}"
        )


def _call_with(function: Callable[..., Any], names: frozenset[str], **keywords: Any) -> Any:
    return function(**{name: value for name, value in keywords.items() if name in names})
