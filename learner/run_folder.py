"""The run folder: where everything that a run leaves behind stands, and which run a command continues.

    runs/<name>-<time>/  config.yaml  logs/  metrics.jsonl  checkpoints/  export/  summary.json

A run is finished when it has a summary. The same configuration started again continues the newest run that is not,
unless another process is at work in it.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from common.config import ConfigError
from learner.config import LearnerConfig

# Who may be at work in a folder: one of each.
Role = Literal["launcher", "learner"]

# Settings that say where and with whom a run runs, not what it computes.
_PLACE = {"run_dir", "runs_dir", "resume", "local", "weights", "metrics_listen"}
_PLACE_IN = {"rollout": {"actors", "tls"}, "trainer": {"rank_timeout_s"}}


@contextlib.contextmanager
def held(config: LearnerConfig, role: Role) -> Iterator[Path]:
    """The folder of this run: the one that the configuration names, one to continue, or a new one.

    It is this process's own in its role until the block or the process ends, however that happens.
    Raises ConfigError if another process has the role there.
    """
    run_dir = config.run_dir or (_unfinished(config) if config.resume else None) or _new(config)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    with _lock(run_dir, role):
        path = run_dir / "config.yaml"
        if not path.exists():
            path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        yield run_dir


@contextlib.contextmanager
def _lock(run_dir: Path, role: Role) -> Iterator[None]:
    descriptor = os.open(run_dir / f"{role}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run_dir}: another {role} is at work in this run folder; stop it, or set resume=false"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _is_free(run_dir: Path) -> bool:
    """Whether no process is at work in the folder."""
    try:
        with _lock(run_dir, "launcher"), _lock(run_dir, "learner"):
            return True
    except ConfigError:
        return False


def clear_last_words(run_dir: Path) -> None:
    """Before a learner starts."""
    (run_dir / "last-words").unlink(missing_ok=True)


def leave_last_words(run_dir: Path, code: int, line: str) -> None:
    """Why the learner ends, for who started it; the first rank to fail has the word, the others fail because of it."""
    with contextlib.suppress(FileExistsError), (run_dir / "last-words").open("x", encoding="utf-8") as file:
        file.write(f"{code} {line}\n")


def read_last_words(run_dir: Path) -> tuple[int, str] | None:
    """Exit code and line of a learner that has ended; None if it had no time to say so."""
    with contextlib.suppress(OSError, ValueError):
        code, _, line = (run_dir / "last-words").read_text(encoding="utf-8").strip().partition(" ")
        return int(code), line
    return None


def _new(config: LearnerConfig) -> Path:
    """Create a folder that nobody else has."""
    config.runs_dir.mkdir(parents=True, exist_ok=True)
    base = config.runs_dir / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for candidate in (base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 100))):
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise ConfigError(f"{base} and a hundred more exist")


def _unfinished(config: LearnerConfig) -> Path | None:
    """The newest folder that was begun with this configuration, has no summary, and nobody works in."""
    wanted = _identity(config.model_dump(mode="json"))
    for run_dir in sorted(config.runs_dir.glob(f"{config.name}-*"), reverse=True):
        path = run_dir / "config.yaml"
        if (run_dir / "summary.json").exists() or not path.is_file():
            continue
        if _identity(yaml.safe_load(path.read_text()) or {}) == wanted and _is_free(run_dir):
            return run_dir
    return None


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two configurations to be of the same run."""
    kept = {key: value for key, value in values.items() if key not in _PLACE}
    for section, place in _PLACE_IN.items():
        kept[section] = {key: value for key, value in kept.get(section, {}).items() if key not in place}
    return kept
