"""Checks of a run's settings that need no model, so that a mistake of the user shows within seconds.

`python -m learner.preflight FILE` tries model.path, rows and rewards. `--all-rows` reads all rows, and not only the
first. The launcher, which looks at the rest itself, tries `--rows-only`: what the modules of the user leave behind, as
the memory of a GPU, ends with the process.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.checkpoint import check_checkpoint
from common.config import ConfigError, load_config
from common.rpc.tls import read_certificates
from learner.config import LearnerConfig, RolloutConfig
from learner.rollouts.discovery import SCHEME

if TYPE_CHECKING:
    from learner.data.dataset import PromptDataset

# Between two lines of progress.
_TELL_S = 10.0


def check_actors(config: RolloutConfig) -> None:
    """Whether actors are named, and certificates can be read where they are asked for. Raises ConfigError."""
    if config.tls is not None:
        read_certificates(config.tls)
    if not config.actors:
        raise ConfigError("rollout.actors is empty; give the actors' addresses, or start the run with `outrider`")
    has_names = any(target.startswith(SCHEME) for target in config.actors)
    if not has_names and config.min_actors > len(config.actors):
        raise ConfigError(f"rollout.min_actors is {config.min_actors}, but there are {len(config.actors)} actors")


def load_task(config: LearnerConfig) -> "tuple[PromptDataset, PromptDataset | None]":
    """The rows, (train, held-out or None). Rewards are tried alone: they load in processes of their own.

    Raises ConfigError.
    """
    from learner.data.dataset import load_datasets
    from learner.rewards.load import load_rewards, undisturbed

    with undisturbed():
        load_rewards(config.reward.functions)
        return load_datasets(config.data)


def main() -> int:
    """The exit code is 2 for a mistake of the user, which is the last line, and 1 for what may come yet."""
    parser = argparse.ArgumentParser(
        prog="python -m learner.preflight", description="Try the rows and rewards of a run."
    )
    parser.add_argument("--all-rows", action="store_true", help="read every row, and print each that is broken")
    parser.add_argument("--rows-only", action="store_true", help="not the model, and say nothing of what is well")
    parser.add_argument("--sound", metavar="NAME", help="say what is well, and that NAME is sound")
    parser.add_argument("config", type=Path, metavar="FILE", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the configuration")
    options = parser.parse_intermixed_args()
    try:
        config = load_config(LearnerConfig, options.config, options.overrides)
        if not options.rows_only:
            check_checkpoint(config.model.path, "model.path")
        train, held_out = load_task(config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.all_rows:
        return _read_all([part for part in (train, held_out) if part is not None])
    if options.sound:
        print(f"{options.sound} is sound: {_summary(config, train, held_out)}")
    elif not options.rows_only:
        print(f"no mistake found: {_summary(config, train, held_out)}, the files of model.path")
    return 0


def _summary(config: LearnerConfig, train: "PromptDataset", held_out: "PromptDataset | None") -> str:
    return (
        f"{len(train)} rows, {len(held_out or ())} held out (columns and the first rows; `python -m learner.preflight "
        f"--all-rows` reads every one), {config.trainer.describe_length(len(train))}, rewards "
        f"{', '.join(config.reward.functions)} (imported)"
    )


def _read_all(parts: "Sequence[PromptDataset]") -> int:
    """Print each broken row; the exit code as of `main`."""
    codes = [0]
    num_rows = sum(map(len, parts))
    told_at = time.monotonic()
    places = itertools.chain.from_iterable(zip(itertools.repeat(part), range(len(part))) for part in parts)
    for num_read, (part, row) in enumerate(places, start=1):
        try:
            part[row]
        except ConfigError as error:
            print(error)
            codes.append(error.exit_code)
        if time.monotonic() - told_at > _TELL_S:
            told_at = time.monotonic()
            print(f"{num_read} of {num_rows} rows read, {len(codes) - 1} broken", file=sys.stderr)
    print(f"{num_rows} rows, {len(codes) - 1} broken", file=sys.stderr)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
