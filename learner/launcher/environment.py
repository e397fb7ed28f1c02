"""What the single-machine launcher's learner finds in its environment."""

import os

from learner.config import LearnerConfig
from learner.stopping import STEP_END_S, TORCHRUN_VARIABLE


def learner_environment(config: LearnerConfig, gpus: tuple[str, ...] | None = None) -> dict[str, str]:
    """Variables of a learner's process beside local actors.

    Threads that wait for each other at every operation are slow on cores that the actors use at the same time. With
    `max_staleness = 0` the actors rest while the learner trains.
    """
    num_used = config.local.num_actors if config.trainer.max_staleness else 0
    num_threads = max(1, (len(os.sched_getaffinity(0)) - num_used) // config.local.num_ranks)
    visible = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    return {"OMP_NUM_THREADS": str(num_threads), TORCHRUN_VARIABLE: str(STEP_END_S), **os.environ, **visible}
