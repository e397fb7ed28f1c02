"""The run folder: where everything that a run leaves behind stands, and which run a command continues.

    runs/<name>-<time>/  config.yaml  logs/  metrics.jsonl  checkpoints/  export/  summary.json

A run is finished when it has a summary. The same configuration started again continues the newest run that is not,
unless another process is at work in it.
"""

import fcntl
import os
import time
from pathlib import Path
from typing import Any

import yaml

from common.config import ConfigError
from learner.config import LearnerConfig

# Settings that say where and with whom a run runs, not what it computes.
_PLACE = {"run_dir", "runs_dir", "resume", "local", "weights"}


def choose(config: LearnerConfig) -> Path:
    """The folder of this run: the one that the configuration names, one to continue, or a new one. Creates it."""
    run_dir = config.run_dir or (_unfinished(config) if config.resume else None) or _new(config)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    path = run_dir / "config.yaml"
    if not path.exists():
        path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return run_dir


def lock(run_dir: Path) -> int:
    """Take the folder for this process, until it ends; the file descriptor that holds it.

    Raises ConfigError if another process has it.
    """
    descriptor = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"{run_dir}: another learner is at work in this run folder; stop it, or set resume=false"
        ) from None
    return descriptor


def is_free(run_dir: Path) -> bool:
    """Whether no process holds the folder."""
    try:
        os.close(lock(run_dir))
    except ConfigError:
        return False
    return True


def _new(config: LearnerConfig) -> Path:
    base = config.runs_dir / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = [base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 100))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _unfinished(config: LearnerConfig) -> Path | None:
    """The newest folder that was begun with this configuration, has no summary, and nobody works in."""
    wanted = _identity(config.model_dump(mode="json"))
    for run_dir in sorted(config.runs_dir.glob(f"{config.name}-*"), reverse=True):
        path = run_dir / "config.yaml"
        if (run_dir / "summary.json").exists() or not path.is_file():
            continue
        if _identity(yaml.safe_load(path.read_text()) or {}) == wanted and is_free(run_dir):
            return run_dir
    return None


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two configurations to be of the same run."""
    kept = {key: value for key, value in values.items() if key not in _PLACE}
    kept["rollout"] = {key: value for key, value in kept.get("rollout", {}).items() if key != "actors"}
    return kept
