"""Which settings make two configurations the same run, and with which others a run may go on."""

import functools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from common.config import Config
from learner.config import LearnerConfig

# Settings that say where, with whom, how fast and how patiently a run runs, not what it computes.
_PLACE = {"run_dir", "runs_dir", "resume", "local", "weights", "metrics_listen", "trackers", "tracing"}
_PLACE_IN = {
    "data": {"max_media_pixels"},
    "evaluation": {"max_failed_share"},
    "model": {"enable_gradient_checkpointing", "use_fused_kernels", "cpu_offload", "use_torch_compile"},
    "reward": {"timeout_s", "num_processes"},
    "rollout": {
        "actors",
        "tls",
        "max_message_bytes",
        "group_timeout_s",
        "hung_s",
        "slots_per_actor",
        "startup_timeout_s",
        "min_actors",
    },
    "trainer": {
        "max_tokens_per_micro_batch",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "log_completions",
        "max_parity_diff",
        "max_mean_parity_diff",
        "fsdp_size",
        "sequence_parallel_size",
        "rank_timeout_s",
        "device",
    },
}
# Settings that a checkpoint cannot go on without: those of what trains, and of which prompt has which number.
_FIXED = {
    "seed",
    *("data.train", "data.format", "data.held_out_fraction", "data.split_seed"),
    *("model.path", "model.lora_rank", "model.lora_alpha", "model.target_modules", "model.exclude_modules"),
    "model.lora_adapter_path",
}
# Of these only the last part of the path: a run may go on where the same claim or disk is mounted elsewhere.
_PATHS = {"data.train", "model.path", "model.lora_adapter_path"}
# Of the keys in which an unfinished run differs.
_MAX_TOLD_KEYS = 3


def identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for two configurations to be of the same run.

    What an earlier version has written has the defaults for what is new, and may say what is no longer allowed.
    """
    kept = {key: value for key, value in _filled(LearnerConfig, values).items() if key not in _PLACE}
    for section, place in _PLACE_IN.items():
        kept[section] = {key: value for key, value in kept[section].items() if key not in place}
    return kept


def _filled(kind: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of a configuration, with the defaults for those that are not there."""
    filled: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, Config):
            filled[name] = _filled(part, values.get(name) or {})
        elif name in values or field.is_required():
            filled[name] = values.get(name)
        else:
            filled[name] = to_jsonable_python(field.get_default(call_default_factory=True))
    return filled


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Paths of the keys with different values."""
    paths: list[str] = []
    for key in {**one, **other}:
        left, right = one.get(key), other.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            paths += [f"{key}.{path}" for path in differences(left, right)]
        elif left != right or (key in one) != (key in other):
            paths.append(key)
    return paths


def unchangeable(odd: Sequence[str], then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Those of the differences with which no checkpoint goes on."""
    moved = {path for path in _PATHS.intersection(odd) if _name(value_at(then, path)) == _name(value_at(now, path))}
    return [path for path in odd if path in _FIXED - moved]


def value_at(values: dict[str, Any], path: str) -> Any:
    """Of a key, by its path as `data.train`."""
    return functools.reduce(operator.getitem, path.split("."), values)


def _name(path: str | None) -> str | None:
    return path and Path(path).name


def enumerated(paths: Sequence[str]) -> str:
    """The first few of them, as a list in a sentence."""
    more = len(paths) - _MAX_TOLD_KEYS
    return ", ".join(paths[:_MAX_TOLD_KEYS]) + (f" and {more} more" if more > 0 else "")
