"""What is looked at before anything starts; with `outrider --check`, nothing starts at all.

A start ends at the first mistake. `--check` tells all that it finds, and asks actors that run already.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from common.checkpoint import check_checkpoint
from common.config import ConfigError
from common.process.lifecycle import end_with_parent
from learner.config import LearnerConfig
from learner.launcher.actors import addresses
from learner.launcher.environment import learner_environment
from learner.launcher.gpus import GpuShares, share_gpus
from learner.preflight import check_actors
from learner.reporting.trackers import check_trackers
from learner.rollouts.limits import check_local_limits
from learner.storage import run_folder


def with_local_actors(config: LearnerConfig) -> LearnerConfig:
    """With the addresses of the actors that are started here, if some are, in `rollout.actors`."""
    actors = addresses(config.local) or config.rollout.actors
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"actors": actors})})


def mistakes(config: LearnerConfig, *, has_model: bool = True) -> Iterator[tuple[int, str]]:
    """Exit code and words of each mistake but those of rows and rewards, which take longest: `try_task` finds them.

    `has_model` is False where the checkpoint is made at the start.
    """
    words = _try_actor(config)
    if words is not None:
        yield words
    else:  # both read local.actor
        yield from _said(lambda: check_local_limits(config))
        yield from _said(lambda: share_gpus(config))
    if has_model:
        yield from _said(lambda: check_checkpoint(config.model.path, "model.path"))
    yield from _said(lambda: run_folder.check(config))
    yield from _said(lambda: check_actors(config.rollout))
    yield from _said(lambda: check_trackers(config.trackers))


def check(config: LearnerConfig, name: str, *, has_model: bool = True) -> int:
    """Tell every mistake in a line, or that `name` is sound; the exit code."""
    config = with_local_actors(config)
    found = list(mistakes(config, has_model=has_model))
    if not config.local.num_actors and config.rollout.actors and (words := _ask_actors(config)) is not None:
        found.append(words)
    gpus = GpuShares() if found else share_gpus(config)
    if (words := try_task(config, gpus.learner, None if found else name)) is not None:
        found.append(words)
    for _, line in found:
        print(f"outrider: {line}", file=sys.stderr)
    return max((code for code, _ in found), default=0)


def _said(check_one: Callable[[], object]) -> Iterator[tuple[int, str]]:
    try:
        check_one()
    except ConfigError as error:
        yield 2, str(error)


def _try_actor(config: LearnerConfig) -> tuple[int, str] | None:
    """Read `local.actor` as the actors will, which the learner does not import; its last words if that fails."""
    return _try("local.actor", "actor.config", config.local.actor, dict(os.environ))


def _ask_actors(config: LearnerConfig) -> tuple[int, str] | None:
    """Ask those that run already; the mistake, if they cannot do what is asked of them."""
    return _try("actors", "learner.launcher.ask", config.model_dump(mode="json"), dict(os.environ))


def try_task(
    config: LearnerConfig, gpus: tuple[str, ...] | None, name_if_sound: str | None = None
) -> tuple[int, str] | None:
    """Load rows and rewards as the learner will; its last words if that fails. A name is said to be sound if not."""
    return _try(
        "rows and rewards",
        "learner.preflight",
        config.model_dump(mode="json"),
        learner_environment(config, gpus),
        "--rows-only",
        *(() if name_if_sound is None else ("--sound", name_if_sound)),
    )


def _try(
    what: str, module: str, settings: dict[str, Any], environment: dict[str, str], *options: str
) -> tuple[int, str] | None:
    """`python -m MODULE FILE` with a file of these settings, in a process that ends with what it loads.

    Its last words if it fails, with `what` in the place of the file's name.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(settings, file)
        file.flush()
        tried = subprocess.run(
            [sys.executable, "-m", module, *options, file.name],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            preexec_fn=end_with_parent,
        )
    if tried.returncode == 0:
        return None
    lines = tried.stderr.splitlines() or [f"{what}: the process ended with {tried.returncode}"]
    own = [line for line in lines if line.startswith(f"{file.name}: ")] or lines[-1:]  # one for each unknown key
    return abs(tried.returncode), "\n".join(line.replace(f"{file.name}: ", f"{what}: ", 1) for line in own)
