"""Settings that vLLM does not take, as the user's mistake: one line, and the key where vLLM names it."""

import contextlib
import dataclasses
import difflib
import re
import textwrap
from collections.abc import Collection, Iterator

import pydantic

from actor.config import VllmConfig
from common.config import ConfigError

# vLLM's reasons can name all that it knows instead.
_MAX_CHARACTERS = 300
_STORED = "what is stored there would outlive an update of the weights"
_DRAFTED = "updates do not reach the weights that draft"
_NOT_WITH_UPDATES = {
    **dict.fromkeys(("kv_transfer_config", "kv_offloading_size", "ec_transfer_config"), _STORED),
    **dict.fromkeys(("speculative_config", "spec_method", "spec_model", "spec_tokens"), _DRAFTED),
}


def check_extra(extra: Collection[str], own: Collection[str], *, takes_updates: bool) -> None:
    """Raises ConfigError for a key of `vllm.extra` that is not vLLM's, or that the actor sets (`own`), or that does not
    go with updates.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)} - set(own)
    for key in extra:
        if key in VllmConfig.model_fields:
            raise ConfigError(f"vllm.extra.{key}: is a key of the configuration; set vllm.{key}")
        if key in own:
            raise ConfigError(f"vllm.extra.{key}: the actor sets it; leave it out")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "give a field of AsyncEngineArgs"
            raise ConfigError(f"vllm.extra.{key}: vLLM has no such argument; {hint}")
        if takes_updates and (why := _NOT_WITH_UPDATES.get(key)):
            raise ConfigError(f"vllm.extra.{key}: {why}; leave it out, or serve one checkpoint with --standalone")


@contextlib.contextmanager
def refused_settings(extra: Collection[str]) -> Iterator[None]:
    """Raises ConfigError where vLLM makes its configuration in it and refuses."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(_line(error, extra)) from error


def _line(error: Exception, extra: Collection[str]) -> str:
    text = str(error)
    if isinstance(error, pydantic.ValidationError):
        first = error.errors(include_url=False)[0]
        place = "".join(f"{part}: " for part in first["loc"][:1])
        text = place + first["msg"].removeprefix("Value error, ")
    keys = {name: f"vllm.{name}" for name in VllmConfig.model_fields if name != "extra"}
    keys |= {name: f"vllm.extra.{name}" for name in extra}
    found = {match.start(): name for name in keys if (match := re.search(_spelled(name), text, re.IGNORECASE))}
    name = found[min(found)] if found else ""
    shown = textwrap.shorten(text.removeprefix(f"{name}: "), _MAX_CHARACTERS, placeholder=" ...")
    return f"{keys.get(name, 'model or vllm')}: {shown}"


def _spelled(name: str) -> str:
    """As vLLM may write the name of a setting: with or without underscores."""
    return rf"\b{name.replace('_', '[_ ]')}\b"
