"""`python -m learner.torchrun`: torchrun, with the exit code 2 where a rank ends with it.

torchrun's own is 1 for any failure, and who starts a job again could not tell a mistake of the user, which stays one.
"""

import sys


def main() -> None:
    """Takes torchrun's arguments and variables."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main()
    except ChildFailedError as error:
        if any(failure.exitcode == 2 for failure in error.failures.values()):
            sys.exit(2)  # the rank has said what is wrong, in a line
        raise


if __name__ == "__main__":
    main()
