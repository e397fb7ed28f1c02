"""Training runs whose stages only take time: the learner's own loop and wire, with actors and a model that are made up.

    Trainer.run -> Control: dispatcher, sampler, gRPC, rewards, buffer, publisher, Gloo  <-> actors with the fake engine
         +------> SimulatedPolicy.step: checks what it was given, and sleeps

Nothing of the loop is written again here: what is replaced are the model's processor and the optimizer's step.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from torch import nn

from actor.engine_fake.prompts import PLACEHOLDER_ID
from benchmarks.serving import serving
from common import log as logging
from common.config import parse_config
from common.media import content_hash
from common.types import ChatMessage, MediaPart, TextPart
from learner.batch.balance import ModelCost
from learner.batch.pack_bytes import decode_packs
from learner.config import LearnerConfig
from learner.control import Control
from learner.data.dataset import PromptDataset
from learner.data.ledger import Ledger
from learner.data.rows import RowReader
from learner.reporting.display import Display
from learner.reporting.json_lines import JsonLines
from learner.reporting.report import Progress, Reporter
from learner.rollouts.dispatcher import DispatchStats
from learner.training.distributed import Ranks, join_ranks
from learner.training.step import StepStats
from learner.training.trainer import RankZero, Trainer
from learner.types import Group, ProcessedPrompt, PromptSample
from learner.weights.snapshot import Snapshot, Snapshotter

# As `actor.config.FakeConfig` has them by default.
_VOCAB_SIZE = 320
_TOKENS_PER_IMAGE = 4
# Of the weights, a square: 256 KiB.
_WIDTH = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What became of a run."""

    steps: tuple[dict[str, Any], ...]
    """Of metrics.jsonl, a line for each step."""
    staleness: tuple[int, ...]
    """Of the oldest token of each step."""
    cpu_s: tuple[float, ...]
    """CPU time of this process, all threads, when each step began."""
    ledger: Ledger
    """What became of each place in the data order."""

    @property
    def seconds(self) -> float:
        """From the beginning of the first step to the end of the last."""
        return float(self.steps[-1]["wall_s"] - self.steps[0]["wall_s"] + self.steps[0]["step_s"])

    @property
    def num_tokens(self) -> int:
        """Tokens trained on."""
        return sum(step["num_tokens"] for step in self.steps)

    @property
    def sequences(self) -> list[int]:
        """Places in the data order that were trained, ascending."""
        return sorted(sequence for step in self.steps for sequence in step["sequences"])


class FakeModelProcessor:
    """What the fake engine makes of chats with at most one image, as the learner's own processor would say it."""

    filler = None

    def process(self, sample: PromptSample) -> ProcessedPrompt:
        """See `learner.types.Processor`."""
        ids: list[int] = []
        for message in sample.messages:
            ids += _text_ids(message.role)
            for part in message.parts:
                ids += [PLACEHOLDER_ID] * _TOKENS_PER_IMAGE if isinstance(part, MediaPart) else _text_ids(part.text)
        return ProcessedPrompt(
            input_ids=np.array(ids, np.int32),
            position_ids=np.arange(len(ids), dtype=np.int64)[None],
            next_position=len(ids),
            media={},
            media_sha256=tuple(content_hash(image) for image in sample.images),
            num_image_tokens=(_TOKENS_PER_IMAGE,) * len(sample.images),
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Letters; they mean nothing."""
        return "".join(chr(97 + token_id % 26) for token_id in token_ids)


def make_prompts(num_rows: int, images: Sequence[bytes] = ()) -> PromptDataset:
    """Prompts that differ in a number; row i asks about image i, modulo their number."""
    rows = []
    for row in range(num_rows):
        of_row = (images[row % len(images)],) if images else ()
        parts: tuple[MediaPart | TextPart, ...] = (
            *(MediaPart(i) for i in range(len(of_row))),
            TextPart(f"What is number {row}?"),
        )
        rows.append(PromptSample(row, (ChatMessage("user", parts),), of_row, str(row)))
    return PromptDataset(rows, RowReader("benchmark"))


class SimulatedPolicy:
    """What `Trainer` needs of `learner.training.policy.Policy`. A step takes `step_s`; the weights mean nothing."""

    placeholder_ids = (PLACEHOLDER_ID,)
    cost = ModelCost()

    def __init__(self, ranks: Ranks, step_s: float) -> None:
        self.version = 0
        self.staleness: list[int] = []
        self.cpu_s: list[float] = []
        self._ranks = ranks
        self._step_s = step_s
        self._snapshotter = Snapshotter(nn.Linear(_WIDTH, _WIDTH), [], is_sender=True, bucket_bytes=2**20)

    def step(self, parts: Sequence[Sequence[torch.Tensor]]) -> list[list[StepStats]]:
        """Take the batch as the real one does, and note how stale its oldest token is."""
        packs = [pack for part in parts for pack in decode_packs(self._ranks.scatter(part))]
        ends_at = time.monotonic() + self._step_s
        self.cpu_s.append(time.process_time())
        self.staleness.append(self.version - min(int(pack.versions.min()) for pack in packs))
        stats = _stats(sum(len(pack.targets) for pack in packs), sum(pack.num_sequences for pack in packs))
        time.sleep(max(0.0, ends_at - time.monotonic()))
        self.version += 1
        return [[stats]]

    def snapshot(self, publish: Callable[[Snapshot], None]) -> None:
        """As `learner.training.policy.Policy`."""
        self._snapshotter.take(self.version, publish)

    def save(self, run_dir: Path, _state: dict[str, Any]) -> Path:
        """Nothing is written."""
        return run_dir

    def finish(self) -> None:
        """Nothing to wait for."""

    def export(self, target: Path) -> Path:
        """Nothing is written."""
        return target


@contextmanager
def fake_actors(folder: Path, num_actors: int, settings: dict[str, Any]) -> Iterator[list[str]]:
    """Actor processes with the fake engine that follow a learner; their addresses. `settings`: their section `fake`."""
    config = folder / "actor.yaml"
    config.write_text(yaml.safe_dump({"engine": "fake", "fake": settings}))
    arguments = ("--listen", "127.0.0.1:0", "--config", str(config))
    with ExitStack() as stack:
        yield [
            stack.enter_context(serving("actor", *arguments, log=folder / f"actor-{i}.log")) for i in range(num_actors)
        ]


def train(
    run_dir: Path,
    prompts: PromptDataset,
    step_s: float,
    on_step: Callable[[int, Sequence[Group]], None] = lambda _version, _groups: None,
    **sections: dict[str, Any],
) -> Run:
    """One run from version 0 to its last step, with these sections of the configuration: `rollout`, `trainer`, ...

    Completion i of the prompt at place s of the data order samples from seed `s * n + i`.
    `on_step` is called after each step, with the version that it led to and the groups that it has trained.
    """
    run_dir.mkdir(parents=True)
    config = parse_config(
        LearnerConfig,
        {
            "model": {"path": run_dir},
            "data": {"train": "benchmark"},
            **sections,
            "rollout": {"seed": 0} | sections["rollout"],
        },
        "benchmark",
    )
    processor: Any = FakeModelProcessor()
    ledger = Ledger(config.seed, len(prompts))
    metrics = run_dir / "metrics.jsonl"
    with ExitStack() as stack:
        logging.configure("info", stack.enter_context((run_dir / "learner.log").open("w")))
        ranks = stack.enter_context(join_ranks("cpu"))
        writer = JsonLines(metrics)
        stack.callback(writer.close)
        policy = SimulatedPolicy(ranks, step_s)
        said = StringIO()
        display = Display(name="benchmark", total_steps=config.trainer.num_steps, run_dir=run_dir, stream=said)
        control = Control(
            config,
            backend="gloo",
            train=prompts,
            held_out=None,
            processor=processor,
            ledger=ledger,
            version=0,
            notify=display.note,
        )
        stack.callback(control.close)
        control.start()
        zero = RankZero(control, ledger, _TellingReporter(on_step, display, writer, Progress()))
        Trainer(config, ranks, cast("Any", policy), run_dir, zero).run()
    steps = tuple(map(json.loads, metrics.read_text().splitlines()))
    return Run(steps, tuple(policy.staleness), tuple(policy.cpu_s), ledger)


class _TellingReporter(Reporter):
    """Tells somebody else, too, which groups each step has trained."""

    def __init__(
        self,
        on_step: Callable[[int, Sequence[Group]], None],
        display: Display,
        metrics: JsonLines,
        progress: Progress,
    ) -> None:
        super().__init__(display, metrics, progress)
        self._on_step = on_step

    def step(
        self, version: int, groups: Sequence[Group], stats: StepStats, dispatch: DispatchStats, **more: Any
    ) -> None:
        """See `Reporter.step`."""
        super().step(version, groups, stats, dispatch, **more)
        self._on_step(version, groups)


def _text_ids(text: str) -> list[int]:
    first = PLACEHOLDER_ID + 1
    return [first + byte % (_VOCAB_SIZE - first) for byte in text.encode()]


def _stats(num_tokens: int, num_sequences: int) -> StepStats:
    """Of a step that learned nothing."""
    nothing: dict[str, Any] = {field.name: 0.0 for field in dataclasses.fields(StepStats)}
    counts = {"num_tokens": num_tokens, "num_input_tokens": num_tokens, "num_sequences": num_sequences}
    return StepStats(**nothing | counts | {"skipped": False, "parity_tokens": 0})
