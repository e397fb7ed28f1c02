"""Reward functions for tests, where reward processes can import them."""

import itertools
import os
import signal
import subprocess
import sys
import time
from typing import Any


def length(completion: str) -> int:
    return len(completion)


def sum_of_ids(token_ids: list[int], **_: Any) -> float:
    return sum(token_ids) / 1000


def process_id(**_: Any) -> float:
    return float(os.getpid())


def is_light(**_: Any) -> bool:
    """Whether the process has loaded nothing that is slow to load."""
    return not {"torch", "vllm", "transformers", "datasets", "grpc"} & set(sys.modules)


def fails(completion: str, ground_truth: str) -> float:
    """Ends in the way that the ground truth says."""
    match ground_truth:
        case "raise":
            raise RuntimeError("judge is down")
        case "exit":
            sys.exit("judge is down")
        case "os._exit":
            os._exit(3)
        case "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        case "loop":
            print("looping", flush=True)
            while True:
                pass
        case "loop in C":
            sum(itertools.repeat(0))
        case "deaf loop":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                pass
    return 1.0


def says_and_hangs(**_: Any) -> float:
    print(f"hanging in {os.getpid()}", flush=True)
    while True:
        signal.pause()


def takes_a_while(completions: list[Any]) -> list[float]:
    print(f"begun in {os.getpid()}", flush=True)
    time.sleep(2)
    return [float(place) for place, _ in enumerate(completions, start=1)]


def ends_others(**_: Any) -> bool:
    """Whether SIGTERM ends a program, and a copy of this process, that the reward starts."""
    with subprocess.Popen(["sleep", "600"]) as program:
        program.terminate()
    runs, says = os.pipe()
    if (copy := os.fork()) == 0:
        os.write(says, b"!")
        time.sleep(600)
    os.read(runs, 1)
    os.kill(copy, signal.SIGTERM)
    return program.returncode == -signal.SIGTERM == -os.WTERMSIG(os.waitpid(copy, 0)[1])


def starts_a_program(completions: list[Any], ground_truth: list[str]) -> list[float]:
    """One that outlives the call, and then hangs, exits or answers, as the row says."""
    print(f"program {subprocess.Popen(['sleep', '600']).pid}", flush=True)
    match ground_truth[0]:
        case "hang":
            time.sleep(600)
        case "exit":
            os._exit(3)
    return [1.0] * len(completions)


def has_no_opinion(ground_truth: str) -> bool:
    """Of which rows `length_or_none` knows nothing."""
    return int(ground_truth) % 50 == 49


def length_or_none(completion: str, ground_truth: str) -> float:
    """Raises for every fiftieth row."""
    if has_no_opinion(ground_truth):
        raise RuntimeError("no opinion of this row")
    return float(len(completion))
