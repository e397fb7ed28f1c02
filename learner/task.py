"""What a run is about, its rows and rewards: loaded before all that takes long, for the user's mistakes are here.

`python -m learner.task FILE` only tries, for the launcher: what the modules of the user leave behind, as the memory of
a GPU, ends with the process.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import ConfigError, NotYet, load_config
from learner.config import LearnerConfig

if TYPE_CHECKING:
    from learner.data import PromptDataset


def load_task(config: LearnerConfig) -> "tuple[PromptDataset, PromptDataset | None]":
    """The rows, (train, held-out or None). Rewards are tried alone: they load in processes of their own.

    Raises ConfigError.
    """
    from learner.data import load_datasets
    from learner.rewards.load import load_rewards

    load_rewards(config.reward.functions)
    return load_datasets(config.data)


def main() -> int:
    """The exit code is 2 for a mistake of the user, which is the last line, and 1 for what may come yet."""
    try:
        load_task(load_config(LearnerConfig, Path(sys.argv[1]), []))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, NotYet) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
