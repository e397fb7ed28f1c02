"""`python -m tests.kills --kills 2000`: one run in which so many actors are killed, with real processes.

Six actors with the fake engine, the learner's own loop; in each step, at a random moment, one of the actors gets
SIGKILL, and is started again a little later. Every trained completion is held against what an engine here makes of its
prompt, and every place of the data order must have been trained once or dropped for a counted reason:
tests/kills/books.py. In place of the kills:

--rolling  each actor in turn is asked to end (SIGTERM), and comes back
--stop     one of three actors is stopped for good (SIGSTOP): what the others do then, against the two alone
--scale    1 actor, then 64, 3 and 32, found by name
"""

import argparse
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from common.process.lifecycle import end_process
from tests.kills.actors import ActorEnded, preload

if TYPE_CHECKING:
    from tests.kills.run import Outcome


def main() -> int:
    """The exit code is 1 if something does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kills", type=int, default=100)
    for name in ("rolling", "stop", "scale"):
        what.add_argument(f"--{name}", dest="what", action="store_const", const=name)
    parser.add_argument("--actors", type=int, default=6, help="that are killed, or restarted")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed, and when")
    parser.add_argument("--keep", type=Path, help="leave the logs in this directory, which must be empty")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # so that nothing is left behind
        signal.signal(number, signal.default_int_handler)
    preload()

    from tests.kills import runs
    from tests.kills.books import Broken

    folder = options.keep or Path(tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        match options.what:
            case "rolling":
                outcome = runs.rolling(folder, options.actors)
            case "stop":
                outcome = runs.stopping(folder)
            case "scale":
                outcome = runs.scaling(folder)
            case _:
                outcome = runs.kills(folder, options.actors, options.kills, options.seed)
        print(_line(outcome))
    except (ActorEnded, Broken) as error:
        print(f"does not hold: {error}")
        return 1
    finally:
        if options.keep is None:
            shutil.rmtree(folder)
    return 0


def _line(outcome: "Outcome") -> str:
    return (
        f"{outcome.told} in {outcome.seconds:.0f} s: {outcome.num_trained} groups trained once each, "
        f"dropped {outcome.dropped}; sent again {outcome.retries}; "
        f"longest time between two steps {max(outcome.steps_s):.1f} s"
    )


if __name__ == "__main__":
    end_process(main())
