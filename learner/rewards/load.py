"""Reward functions by import path.

A reward is a function with keyword arguments, called once for each completion:

    def reward(*, completion: str, ground_truth: str, **_: object) -> float: ...

It may take any of these by name; a `**_` takes the rest:

| keyword | value |
|---|---|
| completion (verl: solution_str) | the text, special tokens left out |
| ground_truth | of the dataset row |
| images | encoded image files, tuple[bytes, ...] |
| extra | the other columns of the row, dict (verl's extra_info: the column of that name) |
| data_source | of the row, "" if it has none |
| prompt | tuple[ChatMessage, ...] |
| token_ids | ids of the completion, list[int] |
| finish_reason | "stop" or "length" |

It runs in a thread, beside others of its kind. It may raise: the group is dropped then and counted, never scored 0.
"""

import importlib
import inspect
from collections.abc import Callable

from common.config import ConfigError

RewardFunction = Callable[..., float]

KEYWORDS = (
    "completion",
    "ground_truth",
    "images",
    "extra",
    "data_source",
    "prompt",
    "token_ids",
    "finish_reason",
    "solution_str",
    "extra_info",
)


def load_object(path: str, what: str) -> object:
    """Import "module:name". Raises `ConfigError`, one line that begins with `what`."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"{what}: {path!r} is not an import path; write it as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{what}: cannot import {module_name!r} ({error}); is its folder on PYTHONPATH?") from None
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigError(f"{what}: module {module_name!r} has no {name!r}") from None


def load_reward(path: str) -> RewardFunction:
    """The function at "module:function", wrapped so that it may be called with all `KEYWORDS`.

    Raises `ConfigError` if it cannot be imported or wants an argument that does not exist.
    """
    function = load_object(path, "reward")
    if not callable(function):
        raise ConfigError(f"reward: {path!r} is a {type(function).__name__}, not a function")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"reward: {path!r} is a coroutine; rewards run in threads, make it a plain function")
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if parameter.kind is parameter.POSITIONAL_ONLY or (required and parameter.name not in KEYWORDS):
            raise ConfigError(
                f"reward: {path!r} wants an argument {parameter.name!r}; it may take, by name: {', '.join(KEYWORDS)}"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function
    wanted = frozenset(parameter.name for parameter in parameters)

    def call(**keywords: object) -> float:
        reward: float = function(**{name: value for name, value in keywords.items() if name in wanted})
        return reward

    return call
