"""`python -m learner.torchrun`: torchrun, with the exit code 2 where a rank ends with it, and time to end a step.

torchrun's own is 1 for any failure, and who starts a job again could not tell a mistake of the user, which stays one.
"""

import os
import sys

from learner.stopping import STEP_END_S, TORCHRUN_VARIABLE


def main() -> None:
    """Takes torchrun's arguments and variables."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault(TORCHRUN_VARIABLE, str(STEP_END_S))
    try:
        run.main()
    except ChildFailedError as error:
        if any(failure.exitcode == 2 for failure in error.failures.values()):
            sys.exit(2)  # the rank has said what is wrong, in a line
        raise


if __name__ == "__main__":
    main()
