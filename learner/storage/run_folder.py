"""The run folder: where everything that a run leaves behind stands, and which run a command continues.

    runs/<name>-<time>/  config.yaml  logs/  metrics.jsonl  completions.jsonl  checkpoints/  export/  summary.json

A run is finished when it has a summary. The same configuration started again continues the newest run that is not,
unless another process is at work in it; a learner gives such a process some time to end. A launcher leaves that to its
learner, as the one of a launcher that was killed ends its step.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from common.config import ConfigError, NotYet
from learner import last_words
from learner.config import LearnerConfig
from learner.storage.same_run import differences, enumerated, identity, unchangeable, value_at

# Who may be at work in a folder: one of each.
Role = Literal["launcher", "learner"]

# As long as Kubernetes lets a pod take to end.
_GRACE_S = 300.0
_LOOK_S = 0.5
# A probe of another process lasts microseconds.
_PROBE_S, _NUM_PROBES = 0.01, 50
# What no other try will change.
_NO_PLACE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


@contextlib.contextmanager
def held(config: LearnerConfig, role: Role) -> Iterator[Path]:
    """The folder of this run: the one that the configuration names, one to continue, or a new one.

    It is this process's own in its role until the block or the process ends, however that happens.
    Raises NotYet if another process has the role there or the disk fails, and ConfigError if the place cannot be
    written, there is something to resume and `resume` is off, or the configuration has other settings than it can go on
    with.
    """
    _check_resume(config)
    # Two launchers are two runs on purpose; a second learner may be what replaces the first.
    patience_s = _GRACE_S if role == "learner" else 0.0
    unfinished = _unfinished(config, role, patience_s) if config.resume and config.run_dir is None else None
    try:
        run_dir = config.run_dir or unfinished or _new(config)
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(_place(config), error, _key(config)) from None
    _gets_free(run_dir, patience_s, role)
    with _lock(run_dir, role):  # a disk that fails is told here
        if not _is_ours(run_dir):
            raise ConfigError(f"{run_dir}{_owner(run_dir)} cannot be written, or a part of it; name another run_dir")
        # A launcher does this for its learner, whose configuration has the model that was prepared for it.
        if role == "launcher" or _is_free(run_dir, "launcher"):
            last_words.clear(run_dir)
            if _has_checkpoints(run_dir):
                _check_goes_on(run_dir, config, role)
            # Of a launcher's folder `config.yaml` is the launcher's.
            theirs = run_dir / "learner.yaml"
            path = theirs if role == "learner" and theirs.exists() else run_dir / "config.yaml"
            write_whole(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        yield run_dir


def check(config: LearnerConfig) -> None:
    """What `held` would refuse, as far as that is known before anything is made. Raises ConfigError."""
    _check_resume(config)
    place = _place(config).absolute()
    there = next(path for path in (place, *place.parents) if os.access(path, os.F_OK))
    if not there.is_dir():
        raise _not_written(place, OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)), _key(config))
    if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
        raise _not_written(there, OSError(errno.EACCES, os.strerror(errno.EACCES)), _key(config))


def _check_resume(config: LearnerConfig) -> None:
    if config.run_dir and not config.resume and _has_checkpoints(config.run_dir):
        raise ConfigError(f"resume: is false, but {config.run_dir} has checkpoints; name another run_dir, or none")


def _place(config: LearnerConfig) -> Path:
    return config.run_dir or config.runs_dir


def _key(config: LearnerConfig) -> str:
    return "run_dir: " if config.run_dir else "runs_dir: "


@contextlib.contextmanager
def _lock(run_dir: Path, role: Role, *, is_probe: bool = False) -> Iterator[None]:
    """Have the role; as a probe, only see that nobody has it."""
    try:
        descriptor = os.open(run_dir / f"{role}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _not_written(run_dir, error) from None
    try:
        try:
            _flock(descriptor, is_probe=is_probe)
        except BlockingIOError:
            raise NotYet(
                f"{run_dir}: another {role} is at work in this run folder; stop it, or set resume=false"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{run_dir}: its file system gives no locks (flock: {error.strerror}); "
                "mount it with them (Lustre: the option flock), or take runs_dir elsewhere"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _flock(descriptor: int, *, is_probe: bool) -> None:
    """Raises BlockingIOError if another process has it, or for half a second many look whether one has."""
    if is_probe:  # which do not see each other
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return
    for _ in range(_NUM_PROBES):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_PROBE_S)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _not_written(place: Path, error: OSError, key: str = "") -> ConfigError | NotYet:
    kind = ConfigError if error.errno in _NO_PLACE else NotYet
    return kind(f"{key}{place}{_owner(place)} cannot be written: {error.strerror}")


def _owner(place: Path) -> str:
    """Whose it is, in words, if it is another user's."""
    try:
        if place.stat().st_uid == os.geteuid():
            return ""
        return f" (of the user {place.owner()})"
    except (OSError, KeyError):  # it is not there, or the user has no name here
        return ""


def _is_ours(run_dir: Path) -> bool:
    """Whether this user may work in it."""
    parts = (run_dir.glob(pattern) for pattern in ("*.lock", "*.jsonl", "logs", "logs/*", "checkpoints"))
    return all(os.access(path, os.R_OK | os.W_OK) for path in (run_dir, *itertools.chain(*parts)))


def _is_free(run_dir: Path, *roles: Role) -> bool:
    """Whether no process has one of these roles in the folder; without any, whether none is at work in it at all."""
    try:
        with contextlib.ExitStack() as locks:
            for role in roles or get_args(Role):
                locks.enter_context(_lock(run_dir, role, is_probe=True))
            return True
    except NotYet:
        return False


def _gets_free(run_dir: Path, patience_s: float, *roles: Role) -> bool:
    """Whether it is free, as `_is_free` says, or is within this time; waiting is said."""
    if patience_s and not _is_free(run_dir, *roles):
        print(f"another learner is at work in {run_dir}; waiting up to {patience_s:g} s for its end", flush=True)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and not _is_free(run_dir, *roles):
            time.sleep(_LOOK_S)
    return _is_free(run_dir, *roles)


def write_whole(path: Path, text: str) -> None:
    """Write a file of the run anew; there is never half of one, whatever fails."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _new(config: LearnerConfig) -> Path:
    """Create a folder that nobody else has."""
    config.runs_dir.mkdir(parents=True, exist_ok=True)
    base = config.runs_dir / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for candidate in (base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 100))):
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise ConfigError(f"{base} and a hundred more exist")


def _unfinished(config: LearnerConfig, role: Role, patience_s: float) -> Path | None:
    """The newest folder that was begun with this configuration, has no summary, and nobody works in.

    One without checkpoints is taken only if none has some. For a launcher, nobody is no other launcher.
    """
    wanted = identity(config.model_dump(mode="json"))
    rivals: tuple[Role, ...] = ("launcher",) if role == "launcher" else get_args(Role)
    hint = ""
    empty: Path | None = None
    for run_dir in sorted(config.runs_dir.glob(f"{config.name}-*"), reverse=True):
        if not os.access(run_dir, os.R_OK | os.X_OK):
            hint = hint or f"{run_dir}{_owner(run_dir)} cannot be read"
            continue
        begun = _read(run_dir / "config.yaml")
        if begun is None or begun.get("name") != config.name or _is_finished(run_dir):
            continue
        then = identity(begun)
        odd = differences(then, wanted)
        if not _is_ours(run_dir):
            if not odd and _has_checkpoints(run_dir):
                hint = hint or f"{run_dir}{_owner(run_dir)} is unfinished, and cannot be written, or a part of it"
            continue
        is_free = _gets_free(run_dir, 0.0 if odd or empty else patience_s, *rivals)
        if _is_finished(run_dir):  # by now
            continue
        if is_free and not odd:
            if _has_checkpoints(run_dir):
                return run_dir
            empty = empty or run_dir
        elif is_free and _has_checkpoints(run_dir):
            continues = "" if unchangeable(odd, then, wanted) else f"; run_dir={run_dir} continues it"
            hint = hint or f"{run_dir} is unfinished and has another {enumerated(odd)}{continues}"
        elif not odd:
            hint = hint or f"{run_dir} is unfinished, and another {role} is at work in it"
    if hint and empty is None:
        print(f"a new run: {hint}", flush=True)
    return empty


def _check_goes_on(run_dir: Path, config: LearnerConfig, role: Role) -> None:
    """Say in which settings the run goes on otherwise; raises ConfigError for those with which it cannot."""
    # A launcher may have prepared a model for its learner.
    begun = (_read(run_dir / "learner.yaml") if role == "learner" else None) or _read(run_dir / "config.yaml")
    if begun is None:
        return
    then = identity(begun)
    now = identity(config.model_dump(mode="json"))
    odd = differences(then, now)
    if fixed := unchangeable(odd, then, now):
        before = [f"{path}={value_at(then, path)}" for path in fixed]
        raise ConfigError(
            f"{fixed[0]}: the checkpoints in {run_dir} are of {enumerated(before)}; give that again, or another run_dir"
        )
    if odd:
        print(f"{run_dir} goes on with another {enumerated(odd)}", flush=True)


def _has_checkpoints(run_dir: Path) -> bool:
    return any(run_dir.glob("checkpoints/step-*"))


def _is_finished(run_dir: Path) -> bool:
    return (run_dir / "summary.json").exists()


def _read(path: Path) -> dict[str, Any] | None:
    """None for what is no configuration."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return values if isinstance(values, dict) else None
