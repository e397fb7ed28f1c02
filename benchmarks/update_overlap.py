"""Training steps/s while weights are being sent, against the same steps without.

One thread trains, on the first core; sending, and the actor, have the other cores. Updates follow each other without a
break. The copy of the model that an update begins with is not part of it: the trainer makes that itself, once a step.
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import say
from benchmarks.update_world import World

GOAL = 0.97
_TURN_S = 8.0
_WIDTH, _DEPTH, _ROWS = 1024, 6, 64


def main() -> None:
    """Run the one case and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update_overlap", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    pairs: int = parser.parse_args().pairs
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        raise SystemExit("update_overlap needs two cores")
    os.sched_setaffinity(0, others)  # of this thread, and of what it starts
    with tempfile.TemporaryDirectory() as temporary, World(Path(temporary), 1) as world:
        trainer = _Trainer(first)
        num_updates = 0

        def updating() -> float:
            nonlocal num_updates
            trainer.start()
            deadline = time.perf_counter() + _TURN_S
            while time.perf_counter() < deadline:
                world.run(world.next_update(gather=False))
                num_updates += 1
            return trainer.stop()

        def alone() -> float:
            trainer.start()
            time.sleep(_TURN_S)
            return trainer.stop()

        alone()
        comparison = harness.compare("one_receiver", updating, alone, pairs=pairs, goal=GOAL, unit="steps/s")
        say(f"{num_updates} updates of {world.num_bytes / 1e6:.0f} MB")
    harness.report("update_overlap", {"one_receiver": comparison})


class _Trainer:
    """Steps of a model that fits into no cache, one after the other, on one core."""

    def __init__(self, core: int) -> None:
        import torch

        self._core = core
        layers = [torch.nn.Linear(_WIDTH, _WIDTH) for _ in range(_DEPTH)]
        self._model = torch.nn.Sequential(*layers)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3)
        self._rows = torch.randn(_ROWS, _WIDTH)
        self._stopping = threading.Event()
        self._rate = 0.0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to train."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._train)
        self._thread.start()

    def stop(self) -> float:
        """Steps a second since `start`."""
        assert self._thread is not None
        self._stopping.set()
        self._thread.join()
        return self._rate

    def _train(self) -> None:
        import torch

        os.sched_setaffinity(0, {self._core})
        torch.set_num_threads(1)
        started_at, steps = time.perf_counter(), 0
        while not self._stopping.is_set():
            self._optimizer.zero_grad()
            self._model(self._rows).square().mean().backward()
            self._optimizer.step()
            steps += 1
        self._rate = steps / (time.perf_counter() - started_at)


if __name__ == "__main__":
    main()
