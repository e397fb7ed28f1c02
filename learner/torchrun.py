"""`python -m learner.torchrun`: torchrun, with the exit code of the rank that failed, and time to end a step.

torchrun's own is 1 for any failure, and who starts a job again could not tell a mistake of the user, which stays one.
Its traceback of itself, which would bury the rank's words, is left out.
"""

import os
import sys

from learner.stopping import STEP_END_S, TORCHRUN_VARIABLE


def main() -> None:
    """Takes torchrun's arguments and variables."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault(TORCHRUN_VARIABLE, str(STEP_END_S))
    try:
        run.main()
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(2 if 2 in codes else _as_shell(error.get_first_failure()[1].exitcode))
    except SignalException as error:  # its ranks have ended by now
        sys.exit(_as_shell(-error.sigval))


def _as_shell(code: int) -> int:
    """Of a process that a signal has ended, which is negative here."""
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    main()
