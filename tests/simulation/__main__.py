"""`python -m tests.simulation --seeds 100000 --start 0 --jobs 2`: many schedules, and the first seed that fails.

One seed again, with its faults and its log: `python -m tests.simulation --seed 17`.
A run in which actors are killed 2,000 times: `python -m tests.simulation --kills 2000`.
1, then 64, 3 and 32 actors: `python -m tests.simulation --scale`.
"""

import argparse
import gc
import itertools
import multiprocessing
import sys
import time
import traceback
from collections import Counter

from common.log import configure
from tests.simulation.plan import make_kill_plan, make_scale_plan
from tests.simulation.world import Result, simulate

_CHUNK = 50


def main() -> int:
    """The exit code is 1 if a schedule fails."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10_000, help="how many schedules")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, help="only this one, in full")
    parser.add_argument("--kills", type=int, help="one run with so many kills of actors")
    parser.add_argument("--scale", action="store_true", help="one run with 1, 64, 3 and 32 actors")
    options = parser.parse_args()
    if options.kills or options.scale:
        configure("critical")
        plan = (lambda rng: make_kill_plan(rng, options.kills)) if options.kills else (lambda _: make_scale_plan())
        _tell(simulate(options.start, plan))
        return 0
    if options.seed is not None:
        configure("info", sys.stdout)
        print(simulate(options.seed))
        return 0
    return _run_many(range(options.start, options.start + options.seeds), options.jobs)


def _tell(result: Result) -> None:
    print(
        f"{len(result.faults)} faults in {result.virtual_s:.0f} s: {result.num_trained} groups trained once each, "
        f"dropped {dict(result.dropped)}; sent again {dict(result.retries)}; "
        f"refused by actors that do not serve {dict(result.refused)}; "
        f"longest time between two steps {result.longest_gap_s:.1f} s"
    )


def _run_many(seeds: range, jobs: int) -> int:
    started_at = told_at = time.monotonic()
    done, virtual_s, faults, dropped = 0, 0.0, Counter[str](), Counter[str]()
    with multiprocessing.Pool(jobs, _begin) as pool:
        for seed, result in pool.imap(_try, seeds, chunksize=_CHUNK):
            if isinstance(result, str):
                print(f"seed {seed} fails, after {done} that hold:\n{result}", flush=True)
                return 1
            done += 1
            virtual_s += result.virtual_s
            faults.update(fault.kind for fault in result.faults)
            dropped.update(result.dropped)
            if time.monotonic() - told_at > 10 or done == len(seeds):
                told_at = time.monotonic()
                print(
                    f"{done} schedules hold (seeds {seeds.start} to {seed}), {done / (told_at - started_at):.0f}/s, "
                    f"{virtual_s / 3600:.1f} h of virtual time, {faults.total()} faults",
                    flush=True,
                )
    print(f"faults: {dict(sorted(faults.items()))}\ngroups dropped: {dict(sorted(dropped.items()))}")
    return 0


def _begin() -> None:
    configure("critical")
    gc.freeze()  # what is imported stays: the collector need not look at it thousands of times


def _try(seed: int) -> tuple[int, Result | str]:
    try:
        return seed, simulate(seed)
    except Exception:  # noqa: BLE001 - it is reported with its seed
        lines = traceback.format_exc().splitlines()
        return seed, "\n".join(itertools.chain(lines[:3], ["..."], lines[-8:]))


if __name__ == "__main__":
    sys.exit(main())
