"""What a run has trained, held against what the engine makes of each prompt and against what the actors have served.

| must hold | known from |
|---|---|
| a trained group is whole, of one actor, and of the row at its place of the data order | numpy's own permutation |
| its tokens, logprobs and ends are what the engine makes of this row with this seed | an engine in this process |
| no token is of a version that its actor did not serve, or too stale | the logs of the actors, the number of the step |
| each place of the data order is trained once, or dropped for a counted reason; none is left | counting |
| groups are dropped for their rewards where these have no opinion, and nowhere else | the row |
"""

import asyncio
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from actor.config import FakeConfig
from actor.engine import EngineMedia, EngineRequest
from actor.engine_fake.engine import FakeEngine
from benchmarks.simulated import Run
from common.types import ChatPrompt, Completion, SamplingParams
from learner.data.dataset import PromptDataset
from learner.types import Group, PromptSample
from tests.helpers.reward_functions import has_no_opinion

# What may become of a group beside being trained.
_REASONS = {"REWARD_RAISED", "ATTEMPTS_EXHAUSTED"}
# In the metrics: groups that were sampled again, which are no losses.
AGAIN = "STALE"


class Broken(Exception):  # noqa: N818 - says what became of it
    """Something does not hold."""


class Books:
    """Of one run over `prompts`, with seed 0 for both the data order and the sampling."""

    def __init__(
        self, prompts: PromptDataset, engine: FakeConfig, n: int, max_tokens: int, batch: int, max_staleness: int
    ) -> None:
        self.num_trained = 0
        self._prompts = prompts
        self._engine = engine.model_copy(update={"first_token_s": 0.0, "token_s": 0.0})
        self._sampling = SamplingParams(n=n, max_tokens=max_tokens)
        self._batch = batch
        self._max_staleness = max_staleness
        self._num_steps = 0
        self._num_tokens = 0
        self._trained: set[int] = set()
        self._trajectories: set[str] = set()
        self._used: set[tuple[str, int]] = set()
        """Actors, by id, and versions that tokens are said to be of."""

    def check_step(self, version: int, groups: Sequence[Group]) -> None:
        """The step that led to `version` has trained `groups`. Raises Broken."""
        self._num_steps += 1
        _require(version == self._num_steps, f"step {self._num_steps} led to version {version}")
        _require(len(groups) == self._batch, f"step {version} has trained {len(groups)} groups")
        expected = asyncio.run(self._generated(group.sequence for group in groups))
        for group, (sample, completions) in zip(groups, expected, strict=True):
            where = f"step {version}, group {group.group_id} of sequence {group.sequence}"
            _require(group.sequence not in self._trained, f"{where} is trained a second time")
            self._trained.add(group.sequence)
            self.num_trained += 1
            _require(group.sample == sample, f"{where} is of row {group.sample.row}, not of row {sample.row}")
            _require(len(group.completions) == len(completions), f"{where} has {len(group.completions)} completions")
            for completion, truth in zip(group.completions, completions, strict=True):
                self._check(f"{where}, completion {truth.index}", version - 1, group.prompt.actor_id, completion, truth)

    def _check(self, where: str, trained_by: int, actor_id: str, completion: Completion, truth: Completion) -> None:
        name = completion.trajectory_id
        _require(name not in self._trajectories, f"{where}: {name} is trained a second time")
        _, index, _, actor = name.rsplit("/", 3)
        _require((index, actor) == (str(truth.index), actor_id), f"{where}: {name} is not of actor {actor_id}")
        is_real = (
            np.array_equal(completion.token_ids, truth.token_ids)
            and np.array_equal(completion.logprobs, truth.logprobs)
            and completion.finish_reason is truth.finish_reason
        )
        _require(is_real, f"{where}: {name} is not what the engine makes of its prompt and seed")
        for span in completion.version_spans:
            staleness = trained_by - span.policy_version
            _require(0 <= staleness <= self._max_staleness, f"{where} has tokens that are {staleness} versions old")
            self._used.add((actor_id, span.policy_version))
        self._trajectories.add(name)
        self._num_tokens += len(truth.token_ids)

    def check_end(self, run: Run, served: Mapping[str, set[int]]) -> None:
        """The run is over. `served`: the versions of each actor. Raises Broken."""
        ledger = run.ledger
        dropped = [sequence for sequences in ledger.dropped.values() for sequence in sequences]
        ended = sorted([*self._trained, *dropped])
        lost, doubled = set(range(max(ended) + 1)).difference(ended), [s for s, n in Counter(ended).items() if n > 1]
        _require(not lost, f"sequence numbers {sorted(lost)[:9]} were neither trained nor dropped")
        _require(not doubled, f"sequence numbers {doubled[:9]} were both trained and dropped")
        _require(not ledger.in_flight, f"in flight at the end: {sorted(ledger.in_flight)}")
        _require(ledger.num_trained == self.num_trained, f"the ledger says that {ledger.num_trained} were trained")
        _require(run.sequences == sorted(self._trained), "the metrics say that others were trained")
        _require(run.num_tokens == self._num_tokens, f"{run.num_tokens} tokens were trained, not {self._num_tokens}")
        _require(ledger.dropped.keys() <= _REASONS, f"groups were dropped for {sorted(ledger.dropped)}")
        counted = {reason: num for reason, num in run.steps[-1]["groups_dropped"].items() if reason != AGAIN}
        told = {reason: len(sequences) for reason, sequences in ledger.dropped.items()}
        _require(counted == told, f"the metrics count {counted} dropped, the ledger {told}")
        refused = {sequence for sequence in ended if has_no_opinion(str(self._row(sequence)))}
        _require(
            refused - set(ledger.dropped.get("ATTEMPTS_EXHAUSTED", ())) == set(ledger.dropped.get("REWARD_RAISED", ())),
            "groups were dropped for their rewards that have some, or the other way round",
        )
        invented = [(actor_id, version) for actor_id, version in self._used if version not in served.get(actor_id, ())]
        _require(not invented, f"tokens are said to be of versions that were not served: {invented[:9]}")

    async def _generated(self, sequences: Iterable[int]) -> list[tuple[PromptSample, list[Completion]]]:
        """What is to be trained at these places of the data order."""
        engine = FakeEngine(self._engine, "truth")
        generated = []
        for sequence in sequences:
            sample = self._prompts[self._row(sequence)]
            media = [EngineMedia(hashlib.sha256(image).digest(), Image.new("RGB", (1, 1))) for image in sample.images]
            sampling = dataclasses.replace(self._sampling, seed=sequence * self._sampling.n)
            request = EngineRequest(str(sequence), ChatPrompt(sample.messages), tuple(media), sampling)
            events = [event async for event in engine.generate(request)]
            completions = [completion for event in events if isinstance(event, list) for completion in event]
            generated.append((sample, sorted(completions, key=lambda completion: completion.index)))
        return generated

    def _row(self, sequence: int) -> int:
        epoch, place = divmod(sequence, len(self._prompts))
        return int(np.random.default_rng([0, epoch]).permutation(len(self._prompts))[place])


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise Broken(message)
