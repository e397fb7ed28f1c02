"""Stand-ins for actors, without gRPC and without time: they answer as fast as the event loop turns.

`FakeActor` is one address: it can be killed, started again, drained or made to misbehave, at any turn of the loop.
"""

import asyncio
import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.client import SampledGroup
from common.errors import Draining, OutriderError, Unreachable, WeightsPending
from common.media import content_hash
from common.types import (
    ActorState,
    ActorStatus,
    ChatMessage,
    ChatPrompt,
    Completion,
    EpochSpec,
    FinishReason,
    Manifest,
    MediaUse,
    PlaceholderRange,
    PromptInfo,
    RolloutRequest,
    ServerInfo,
    ServerLimits,
    TextPart,
    VersionSpan,
)
from learner.rewards.base import ScoringTask
from learner.rewards.forms import as_group_reward
from learner.rewards.scoring import score
from learner.rollouts.sampler import Sampler
from learner.types import Group, ProcessedPrompt, PromptSample, Scores

PLACEHOLDER_ID = 1
IMAGE_TOKENS = 3


async def until(condition: Callable[[], object], pause_s: float = 0.0) -> None:
    """Let the event loop turn until `condition` holds; the test's own time limit bounds it."""
    while not condition():  # noqa: ASYNC110 - the condition has no event
        await asyncio.sleep(pause_s)


async def sample_all(
    sampler: Sampler,
    requests: Sequence[RolloutRequest],
    min_version: int = 0,
    expected: Sequence[ProcessedPrompt] | None = None,
) -> list[SampledGroup]:
    """All at once; results in the order of the requests."""
    checks: Sequence[ProcessedPrompt | None] = expected if expected is not None else [None] * len(requests)
    return await asyncio.gather(
        *(
            sampler.sample(request, min_version=lambda: min_version, expected=check)
            for request, check in zip(requests, checks, strict=True)
        )
    )


def make_sample(row: int, images: Sequence[bytes] = ()) -> PromptSample:
    """A prompt that says its row; the ground truth is the text that `completion_of` yields for it."""
    return PromptSample(row, (ChatMessage("user", (TextPart(f"row {row}"),)),), tuple(images), str(row))


def make_task(*texts: str, **columns: Any) -> ScoringTask:
    """A group as reward functions see it; completion i has token i. `columns` are fields of the sample."""
    sample = dataclasses.replace(make_sample(4), **columns)
    return ScoringTask(sample, texts, tuple([i] for i in range(len(texts))), ("stop",) * len(texts))


class InlineRewards:
    """Scores with a function that need not be importable, where it is called. The texts are empty."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._rewards = [as_group_reward(function, "a function of a test")]

    async def score(self, sample: PromptSample, completions: Sequence[Completion]) -> Scores:
        task = ScoringTask.of(sample, completions, lambda _: "")
        return score(task, ["inline"], self._rewards, [1.0])


def process(sample: PromptSample) -> ProcessedPrompt:
    """What both the fake processor and the fake actor make of a prompt: 3 placeholders per image, then the text."""
    ids = [PLACEHOLDER_ID] * (IMAGE_TOKENS * len(sample.images))
    ids += [2 + byte for part in sample.messages[0].parts if isinstance(part, TextPart) for byte in part.text.encode()]
    return ProcessedPrompt(
        input_ids=np.array(ids, np.int32),
        position_ids=np.arange(len(ids), dtype=np.int64)[None],
        next_position=len(ids),
        media={},
        media_sha256=tuple(content_hash(image) for image in sample.images),
        num_image_tokens=(IMAGE_TOKENS,) * len(sample.images),
    )


class FakeProcessor:
    """`process` as an object."""

    def process(self, sample: PromptSample) -> ProcessedPrompt:
        return process(sample)


class Rows:
    """A dataset of `num_rows` prompts."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> PromptSample:
        return make_sample(row)


def make_completion(
    group_id: str, index: int, actor_id: str, spans: Sequence[tuple[int, int]] = ((0, 2),)
) -> Completion:
    """A completion whose tokens come from spans of (version, number of tokens), and from its name."""
    num_tokens = sum(length for _, length in spans)
    digest = hashlib.sha256(f"{group_id}/{index}".encode()).digest()
    ends = np.cumsum([length for _, length in spans]).tolist()
    return Completion(
        trajectory_id=f"{group_id}/{index}/{actor_id}",
        index=index,
        token_ids=np.array([2 + byte for byte in digest[:num_tokens]], np.int32),
        logprobs=np.full(num_tokens, -1.0, np.float32),
        finish_reason=FinishReason.STOP,
        version_spans=tuple(
            VersionSpan(version, end - length, end) for (version, length), end in zip(spans, ends, strict=True)
        ),
    )


def make_group(sequence: int, version: int = 0, n: int = 2) -> Group:
    """A finished group, all of one version."""
    sample = make_sample(sequence)
    processed = process(sample)
    completions = tuple(make_completion(f"g{sequence}", i, "a", ((version, 2),)) for i in range(n))
    prompt = PromptInfo(f"g{sequence}", "a", processed.input_ids, processed.input_ids)
    return Group(f"g{sequence}", sequence, sample, processed, prompt, completions, np.zeros(n, np.float32))


@dataclass
class FakeActor:
    """One address. `turns` says for how many turns of the loop a group generates."""

    address: str
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    max_turns: int = 8
    run_id: str = ""
    state: ActorState = ActorState.SERVING
    version: int = 0
    incarnation: int = 1
    alive: bool = True
    failure: OutriderError | None = None
    """Raised by every Generate as long as it is set."""
    change: Callable[[SampledGroup], SampledGroup] = lambda sampled: sampled
    requests: list[RolloutRequest] = field(default_factory=list)
    media: set[bytes] = field(default_factory=set)
    """Hashes of what it has been sent."""
    num_running: int = 0
    gate: asyncio.Event | None = None
    """Groups wait for it, if given."""
    limits: ServerLimits = field(default_factory=ServerLimits)

    @property
    def actor_id(self) -> str:
        return f"{self.address}#{self.incarnation}"

    def kill(self) -> None:
        self.alive = False

    def restart(self, state: ActorState = ActorState.PENDING_WEIGHTS, version: int = 0) -> None:
        self.alive = True
        self.incarnation += 1
        self.state, self.version = state, version

    def connect(self) -> "FakeClient":
        return FakeClient(self)


class FakeClient:
    """An `ActorClient` of a `FakeActor`."""

    def __init__(self, actor: FakeActor) -> None:
        self.actor = actor
        self.address = actor.address
        self.num_forgotten = 0
        self.is_cut = False
        self.is_closed = False

    def _check(self, incarnation: int) -> None:
        if self.is_cut or self.is_closed or not self.actor.alive or self.actor.incarnation != incarnation:
            raise Unreachable("connection reset")

    async def generate(
        self, request: RolloutRequest, *, timeout_s: float, on_progress: Callable[[], None] = lambda: None
    ) -> SampledGroup:
        actor, incarnation = self.actor, self.actor.incarnation
        self._check(incarnation)
        actor.requests.append(request)
        if actor.failure is not None:
            raise actor.failure
        if actor.state is ActorState.DRAINING:
            raise Draining("about to leave")
        if actor.state is not ActorState.SERVING or actor.version < request.min_policy_version:
            raise WeightsPending("not yet")
        if request.run_id not in ("", actor.run_id):
            raise WeightsPending("of another run")
        actor.media.update(item.sha256 for item in request.media)
        first_version = actor.version
        actor.num_running += 1
        try:
            for _ in range(actor.rng.randrange(actor.max_turns)):
                await asyncio.sleep(0)
                self._check(incarnation)
            if actor.gate is not None:
                await actor.gate.wait()
                self._check(incarnation)
        finally:
            actor.num_running -= 1
        # A swap in mid-group: the first token is of the old version.
        spans = [(first_version, 1), (actor.version, 1)] if actor.version != first_version else [(first_version, 2)]
        assert isinstance(request.prompt, ChatPrompt)
        sample = PromptSample(0, request.prompt.messages, tuple(item.encoded or b"" for item in request.media), None)
        ids = process(sample).input_ids
        uses = tuple(
            MediaUse(item.sha256, PlaceholderRange(i * IMAGE_TOKENS, IMAGE_TOKENS), IMAGE_TOKENS)
            for i, item in enumerate(request.media)
        )
        prompt = PromptInfo(request.group_id, actor.actor_id, ids, ids, uses, (PLACEHOLDER_ID,))
        completions = [make_completion(request.group_id, i, actor.actor_id, spans) for i in range(request.sampling.n)]
        return actor.change(SampledGroup(prompt, tuple(completions)))

    async def status(self, *, timeout_s: float = 5.0) -> ActorStatus:
        actor = self.actor
        self._check(actor.incarnation)
        return ActorStatus(actor.actor_id, actor.state, actor.version, actor.run_id, 0, -1, actor.num_running, 0, 1)

    def holds(self, media: Sequence[bytes]) -> bool:
        return self.actor.media.issuperset(media)

    def forget_media(self) -> None:
        self.num_forgotten += 1

    async def server_info(self, *, timeout_s: float = 5.0) -> ServerInfo:
        self._check(self.actor.incarnation)
        return ServerInfo(self.actor.actor_id, "model", "Fake", "fake", "0", "0", self.actor.version, self.actor.limits)

    async def open_epoch(self, spec: EpochSpec) -> None:
        raise NotImplementedError

    async def stage(self, run_id: str, epoch: int, manifest: Manifest, *, timeout_s: float) -> tuple[int, ...]:
        raise NotImplementedError

    async def commit(self, run_id: str, epoch: int, policy_version: int, *, timeout_s: float) -> float:
        raise NotImplementedError

    async def abort(self, run_id: str, epoch: int, *, timeout_s: float = 5.0) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        self.is_closed = True
