"""Completions/s of one training step: packing and `train_step` against TRL's GRPOTrainer, without sampling.

Both sides train the same tiny Qwen2.5-VL in float32 on the same given batches: scans as prompts, groups of completions
whose lengths are geometric with mean 12 and end at 128, old logprobs and advantages. A step of ours is from finished
groups to the optimizer's step; a step of TRL's begins with tensors that are padded already. Images are processed
beforehand on both sides.

Losses of all batches and the norm of every parameter's gradient on the first one must be equal on both sides.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import harness, peers
from benchmarks.harness import say
from benchmarks.side import Process

if TYPE_CHECKING:
    from learner.batch.packing import PackedBatch
    from learner.types import Group

CASE = "long_tail"
GOAL = 2.0
NUM_BATCHES = 4  # a turn is one step on each
NUM_PROMPTS = 32
GROUP_SIZE = 8
MEAN_LENGTH = 12
MAX_TOKENS = 128
LEARNING_RATE = 1e-12
# Completions are letters and an end; a random model gives each of its 320 tokens about this logprob.
LETTERS = (65, 91)
OLD_LOGPROB = -5.8
MAX_DIFFERENCE = 1e-3
SHIM = Path(__file__).resolve().parents[1] / "common" / "torchvision_ops.py"


@dataclass(frozen=True, slots=True)
class GivenGroup:
    """A prompt, by its row in the data, with completions that both sides train on."""

    row: int
    completions: list[list[int]]
    old_logprobs: list[list[float]]
    advantages: list[float]


def main() -> None:
    """Run the case and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_vs_trl", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    pairs: int = parser.parse_args().pairs
    python = peers.python()
    batches = [make_batch(seed) for seed in range(NUM_BATCHES)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write(folder, batches)
        say("starting TRL's side")
        command: list[str | Path] = [python, "-m", "benchmarks.trl_step_side", folder, SHIM]
        with Process(command, folder / "trl.log") as trl:
            ours = _OurSide(folder, batches)
            _require_equal_steps(ours, trl)
            result = harness.compare(
                CASE, ours.rate, lambda: _trl_rate(trl), pairs=pairs, goal=GOAL, unit="completions/s"
            )
    harness.report("step_vs_trl", {CASE: result})


def make_batch(seed: int) -> list[GivenGroup]:
    """Groups with random letters as completions; each ends with the end of the turn unless it was cut."""
    rng = np.random.default_rng(seed)
    return [_make_group(rng, seed * NUM_PROMPTS + index) for index in range(NUM_PROMPTS)]


def _make_group(rng: np.random.Generator, row: int) -> GivenGroup:
    from examples.digits.model import TOKEN_IDS

    completions = []
    for length in rng.geometric(1 / MEAN_LENGTH, GROUP_SIZE):
        letters = rng.integers(*LETTERS, min(length, MAX_TOKENS)).tolist()
        completions.append(letters if length > MAX_TOKENS else [*letters[:-1], TOKEN_IDS["<|im_end|>"]])
    return GivenGroup(
        row,
        completions,
        [(OLD_LOGPROB + rng.uniform(-0.3, 0.3, len(ids))).tolist() for ids in completions],
        rng.standard_normal(GROUP_SIZE).tolist(),
    )


def _write(folder: Path, batches: Sequence[Sequence[GivenGroup]]) -> None:
    from benchmarks.workload import training_rows
    from examples.digits.model import build_model

    build_model(folder / "model", seed=0)
    training_rows().to_parquet(folder / "train.parquet")
    work = {
        "batches": [{"groups": [asdict(group) for group in batch]} for batch in batches],
        "group_size": GROUP_SIZE,
        "max_tokens": MAX_TOKENS,
        "learning_rate": LEARNING_RATE,
    }
    (folder / "batches.json").write_text(json.dumps(work))


class _OurSide:
    """The learner's training step in this process."""

    def __init__(self, folder: Path, batches: Sequence[Sequence[GivenGroup]]) -> None:
        from benchmarks.learner_side import LearnerSide
        from learner.batch.processing import PromptProcessor
        from learner.config.algorithm import AlgorithmConfig

        processor = PromptProcessor(folder / "model")
        self.side: LearnerSide = LearnerSide(folder / "model", AlgorithmConfig(aggregation="seq-mean-token-mean"))
        self._filler = processor.filler
        self._batches = [[_to_group(group, processor) for group in batch] for batch in batches]
        self._advantages = [[np.array(group.advantages, np.float32) for group in batch] for batch in batches]

    @property
    def facts(self) -> dict[str, Any]:
        """What the other side must agree with."""
        return {
            "prompt_ids": self._batches[0][0].processed.input_ids.tolist(),
            "num_tokens": [
                sum(len(completion.token_ids) for group in batch for completion in group.completions)
                for batch in self._batches
            ],
        }

    def pack(self, index: int) -> "list[PackedBatch]":
        """The micro-batches of a batch."""
        from learner.batch.packing import pack_batch

        batch, values = self._batches[index], self._advantages[index]
        [packs] = pack_batch(batch, values, filler=self._filler, cost=self.side.cost)
        return packs

    def rate(self) -> float:
        """Completions/s of a step on each batch."""
        started_at = time.perf_counter()
        for index in range(NUM_BATCHES):
            self.side.train(self.pack(index))
        return NUM_BATCHES * NUM_PROMPTS * GROUP_SIZE / (time.perf_counter() - started_at)


def _to_group(given: GivenGroup, processor: Any) -> "Group":
    from benchmarks.learner_side import group
    from examples.digits import data
    from learner.types import PromptSample

    rows, _ = data.split()
    images = (data.png(int(rows[given.row])),)
    prompt = processor.process(PromptSample(given.row, data.messages(), images, ground_truth=""))
    token_ids = [np.array(ids, np.int32) for ids in given.completions]
    return group(given.row, prompt, token_ids, [np.array(values, np.float32) for values in given.old_logprobs])


def _require_equal_steps(ours: _OurSide, trl: Process) -> None:
    """Compare what both sides compute in their first steps, which also warm them up."""
    for name, value in ours.facts.items():
        harness.require_equal(name, value, trl.facts[name])
    answer = trl.ask({"steps": NUM_BATCHES})
    for index in range(NUM_BATCHES):
        loss, gradients = ours.side.gradients(ours.pack(index))
        harness.require_close(f"the loss of batch {index}", loss, answer["losses"][index], MAX_DIFFERENCE)
        if index == 0:
            norms: dict[str, float] = answer["gradient_norms"]
            harness.require_equal("parameters with a gradient", sorted(gradients), sorted(norms))
            for name, gradient in gradients.items():
                harness.require_close(f"the gradient of {name}", float(gradient.norm()), norms[name], MAX_DIFFERENCE)
    say(f"equal losses of {NUM_BATCHES} batches, equal gradients of {len(answer['gradient_norms'])} parameters")
    ours.rate()


def _trl_rate(trl: Process) -> float:
    seconds: list[float] = trl.ask({"steps": NUM_BATCHES})["step_s"]
    return NUM_BATCHES * NUM_PROMPTS * GROUP_SIZE / sum(seconds)


if __name__ == "__main__":
    main()
