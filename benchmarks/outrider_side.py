"""Outrider's side of `demo_vs_trl`: the demo's own configuration on another workload, its actors kept alive.

A turn is one learner process that trains from the workload's checkpoint on; the actors go over to it and stay for the
next turn. Nothing of the learner's start, and none of its first steps, is timed.
"""

import hashlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from benchmarks.side import Turn
from benchmarks.workload import Workload
from common.config import load_config
from learner.batch.processing import PromptProcessor
from learner.config import LearnerConfig
from learner.data.dataset import load_datasets
from learner.launcher.actors import LocalActors, addresses
from learner.launcher.environment import learner_environment

DEMO = Path(__file__).resolve().parents[1] / "examples" / "digits" / "config.yaml"
_BASE_PORT = 52451
_STOP_S = 20.0
_LONGEST_PROMPT = 64


class OutriderSide:
    """Two vLLM actors that live as long as this object, and a learner for each turn."""

    def __init__(self, folder: Path, workload: Workload) -> None:
        self._folder = folder
        self._workload = workload
        self._num_turns = 0
        self._config = load_config(LearnerConfig, DEMO, _overrides(folder, workload))
        run_dir = folder / "actors"
        (run_dir / "logs").mkdir(parents=True)
        self._actors = LocalActors(self._config.local, self._config.model.path, run_dir)

    def __enter__(self) -> Self:
        self._actors.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._actors.terminate()
        self._actors.end(time.monotonic() + _STOP_S)

    @property
    def facts(self) -> dict[str, Any]:
        """What the other side must agree with, by our own reading of the workload."""
        train, _ = load_datasets(self._config.data)
        samples = [train[row] for row in range(len(train))]
        prompt = PromptProcessor(self._config.model.path).process(samples[0])
        return {
            "first_prompt_ids": prompt.input_ids.tolist(),
            "images_sha256": hashlib.sha256(b"".join(sample.images[0] for sample in samples)).hexdigest(),
        }

    def take(self, steps: int) -> Turn:
        """Let a learner take `steps` optimizer steps. Raises `RuntimeError`, with the end of its log, if it fails."""
        self._num_turns += 1
        run_dir = self._folder / f"turn-{self._num_turns}"
        (run_dir / "logs").mkdir(parents=True)
        trainer = self._config.trainer.model_copy(update={"total_steps": steps})
        rollout = self._config.rollout.model_copy(update={"actors": addresses(self._config.local)})
        config = self._config.model_copy(update={"run_dir": run_dir, "trainer": trainer, "rollout": rollout})
        path = run_dir / "learner.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        with (run_dir / "output.log").open("wb") as log:
            command = [sys.executable, "-m", "learner", "--config", str(path)]
            code = subprocess.run(
                command, env=learner_environment(config), stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
            ).returncode
        if code != 0:
            raise RuntimeError(f"the learner ended with {code}: {(run_dir / 'output.log').read_text()[-2000:]}")
        return self._read(run_dir / "metrics.jsonl")

    def _read(self, metrics: Path) -> Turn:
        """From the wall times at which steps ended: whatever happens between two steps is in."""
        steps = [json.loads(line) for line in metrics.read_text().splitlines()]
        steps = [step for step in steps if "step_s" in step]
        ends = [steps[0]["wall_s"] - steps[0]["step_s"], *(step["wall_s"] for step in steps)]
        return Turn(
            step_s=tuple(end - start for start, end in itertools.pairwise(ends)),
            completions=sum(len(step["sequences"]) for step in steps) * self._workload.group_size,
            tokens=sum(step["num_tokens"] for step in steps),
        )


def _overrides(folder: Path, workload: Workload) -> list[str]:
    """Where the workload differs from the demo. Evaluation and checkpoints are off, as they are for the peer."""
    context = _LONGEST_PROMPT + workload.max_tokens
    values: dict[str, Any] = {
        "name": "benchmark",
        "model.path": str(folder / "model"),
        "data.train": str(folder / "train.parquet"),
        "data.held_out": "",
        "rollout.n": workload.group_size,
        "rollout.max_tokens": workload.max_tokens,
        "rollout.allowed_token_ids": list(workload.allowed_token_ids),
        "algorithm.entropy_coef": 0.0,
        "optimizer.lr": workload.learning_rate,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "trainer.batch_prompts": workload.num_prompts,
        "trainer.total_steps": 1,
        "trainer.eval_every": 0,
        "trainer.checkpoint_every": 0,
        "trainer.max_parity_diff": None,
        "local.base_port": _BASE_PORT,
        "local.actor.vllm.max_model_len": max(128, context),
        "resume": False,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
