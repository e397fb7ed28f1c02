"""A real training job on machines of its own: some actors, and a learner of two ranks under torchrun.

`Setup` says what engine the actors have; the model is the tiny one of the digits. All else is what a cluster runs.
"""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tests.helpers.launched import read_metrics
from tests.injection.machines import Machine, Machines
from tests.injection.setups import MAX_PARITY_DIFF, Setup

T = TypeVar("T")

NODES = ("node-0", "node-1")
_PORT = 50051


@dataclass(frozen=True, slots=True)
class Published:
    """One update that is through."""

    at: float
    version: int
    num_actors: int


class Job:
    """Starts and restarts the processes, and reads what the learner says of itself."""

    def __init__(self, setup: Setup, machines: Machines, directory: Path, model_dir: Path) -> None:
        self.setup = setup
        self.actors = [machines.by_name[name] for name in setup.actors]
        self.nodes = [machines.by_name[name] for name in NODES]
        self.num_nodes = 0
        """Those that the learner has; it has two ranks in any case."""
        self.run_dir = directory / "run"
        self._config = directory / "run.yaml"
        self._model_dir = model_dir

    def start_actor(self, machine: Machine) -> None:
        """A new incarnation."""
        machine.start(
            *("tests.injection.actor", "--engine", self.setup.engine, "--model", str(self._model_dir)),
            *("--listen", self._address(machine), "insecure=true", "grace_s=1", *self.setup.actor),
        )

    def start_learner(self, num_nodes: int, total_steps: int = 100_000) -> None:
        """Both ranks, on one or two machines; they resume where the ones before were."""
        self.num_nodes = num_nodes
        self._config.write_text(yaml.safe_dump(self._settings(total_steps)))
        for i, node in enumerate(self.nodes[:num_nodes]):
            node.start(
                *("torch.distributed.run", "--nnodes", str(num_nodes), "--node-rank", str(i)),
                *("--nproc-per-node", str(2 // num_nodes), "--master-addr", self.nodes[0].address),
                *("--master-port", "29500", "-m", "tests.injection.learner", "--config", str(self._config)),
                *self.setup.learner,
            )

    def node_of(self, rank: int) -> Machine:
        """Where this rank of the learner is."""
        return self.nodes[rank * self.num_nodes // 2]

    @property
    def learner_ended(self) -> bool:
        """Whether all of it has."""
        return all(node.ended for node in self.nodes)

    def _settings(self, total_steps: int) -> dict[str, Any]:
        return {
            "model": {"path": str(self._model_dir)},
            "data": {"train": "examples.digits.data:train"},
            "reward": {"functions": ["tests.helpers.reward_functions:sum_of_ids"], "num_processes": 1},
            "rollout": {"actors": [self._address(actor) for actor in self.actors], "max_tokens": 4},
            "trainer": {
                "total_steps": total_steps,
                "batch_prompts": self.setup.batch_prompts,
                "checkpoint_every": 1,
                "device": "cpu",
            },
            "weights": {"bucket_mib": 1},
            "run_dir": str(self.run_dir),
        }

    def _address(self, actor: Machine) -> str:
        return f"{actor.address}:{_PORT}"

    # ------------------------------------------------------------------------------------ what the learner says

    def published(self, after: float = 0.0) -> list[Published]:
        """Updates that were through after this time."""
        lines = self._said("published", after)
        return [Published(_time(line), line["version"], line["num_actors"]) for line in lines]

    def steps_at(self, after: float = 0.0) -> list[float]:
        """When checkpoints were on disk; each step has one."""
        return [_time(line) for line in self._said("checkpoint", after)]

    def left_at(self, machine: Machine, after: float) -> list[float]:
        """When the fleet noticed that this actor was gone."""
        lines = self._said("actor", after)
        return [_time(line) for line in lines if line["kind"] == "left" and line["address"].startswith(machine.address)]

    def newest(self) -> int:
        """The last version that was published."""
        published = self.published()
        return published[-1].version if published else -1

    def _said(self, event: str, after: float) -> list[dict[str, Any]]:
        path = self.run_dir / "logs" / "learner-0.log"
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if line["event"] == event and _time(line) > after]

    def check_learned_once(self) -> tuple[int, int]:
        """Each group was trained once or dropped for a reason that was counted; how many steps, how many dropped."""
        steps = {line["step"]: line for line in read_metrics(self.run_dir)}
        assert sorted(steps) == list(range(1, len(steps) + 1)), "a step is missing"
        sequences = [sequence for line in steps.values() for sequence in line["sequences"]]
        num_groups = self.setup.batch_prompts * len(steps)
        assert len(sequences) == len(set(sequences)) == num_groups, "a group was trained twice"
        state = max((self.run_dir / "checkpoints").glob("step-*")) / "state.json"
        dropped = json.loads(state.read_text())["ledger"]["dropped"]
        num_dropped = sum(map(len, dropped.values()))
        assert set(range(max(sequences) + 1)) - set(sequences) <= {s for group in dropped.values() for s in group}
        return len(steps), num_dropped

    # ------------------------------------------------------------------------------------------------- waiting

    def until(self, condition: Callable[[], T | None], timeout_s: float, what: str) -> T:
        """Wait for it, and return what it says."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                said = "\n".join(f"--- {machine.name}\n{machine.said}" for machine in (*self.nodes, *self.actors))
                raise TimeoutError(f"not within {timeout_s:.0f} s: {what}\n{said}")
            time.sleep(0.05)
        return value

    def until_whole(self, timeout_s: float | None = None) -> float:
        """Wait until all actors have the newest version; when that was."""
        after = time.time()

        def whole() -> float | None:
            return next((p.at for p in self.published(after) if p.num_actors == len(self.actors)), None)

        return self.until(whole, timeout_s or self.setup.start_s, "an update of all actors")

    def until_compared(self) -> float:
        """Wait until logprobs of each actor have been compared with the learner's; the largest difference.

        Only tokens count that were sampled by versions from now on.
        """
        newest = self.newest()

        def largest() -> float | None:
            lines = [line for line in self._said("compared", 0.0) if line["step"] > newest]
            assert all(sum(line["tokens"].values()) == line["num_tokens"] for line in lines), "tokens that do not count"
            address_of = {line["actor_id"]: line["address"] for line in self._said("actor", 0.0)}
            seen = {address_of[actor_id] for line in lines for actor_id in line["tokens"]}
            is_each = seen == {self._address(actor) for actor in self.actors}
            return max(float(line["max_abs_diff"]) for line in lines) if is_each else None

        diff = self.until(largest, self.setup.start_s, "a comparison with the logprobs of each actor")
        assert 0 < diff <= MAX_PARITY_DIFF, f"logprobs of learner and actors differ by {diff}"
        return diff

    def start_over(self, num_nodes: int) -> None:
        """All processes anew, the learner from its last checkpoint."""
        for machine in (*self.nodes, *self.actors):
            machine.kill()
            machine.heal()
        for actor in self.actors:
            self.start_actor(actor)
        self.start_learner(num_nodes)

    def finish(self, num_steps: int) -> None:
        """Have another learner take so many steps more, to the end of the run."""
        self.start_learner(1, self.newest() + num_steps)
        self.until(lambda: self.learner_ended, self.setup.start_s, "the end of the run")
        assert (self.run_dir / "summary.json").exists(), self.nodes[0].said

    def stop_learner(self) -> None:
        """As Kubernetes does it."""
        for node in self.nodes:
            node.signal(signal.SIGTERM)
        self.until(lambda: self.learner_ended, 60, "the end of the learner")


def _time(line: dict[str, Any]) -> float:
    return datetime.fromisoformat(line["timestamp"]).timestamp()
