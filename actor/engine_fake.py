"""An engine without a model, for tests of scale and faults. It keeps the whole contract of `actor.engine.Engine`.

Tokens, logprobs and lengths are a function of the prompt, the seed and the index, and of nothing else; times are the
configured ones. Weights are really received, over a real process group, and thrown away at the commit.
"""

import asyncio
import bisect
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from actor.adapters import Adapters
from actor.config import FakeConfig
from actor.engine import EngineInfo, EngineLoad, EngineMedia, EngineRequest
from actor.fake_answers import best_beams, processed, top_logprobs, with_prompt_logprobs
from common.errors import EngineDead, InvalidRequest, NotStaged, StageBlocked, StageTimeout, Unimplemented
from common.types import (
    ChatPrompt,
    Completion,
    EpochSpec,
    FinishReason,
    FloatArray,
    IntArray,
    Manifest,
    MediaPart,
    MediaUse,
    PlaceholderRange,
    Prompt,
    PromptInfo,
    TextPrompt,
    TokenPrompt,
    VersionSpan,
)

if TYPE_CHECKING:
    from actor.transfer import WeightReceiver

_Tokens = tuple[IntArray, FloatArray, FinishReason]

EOS_ID = 0
PLACEHOLDER_ID = 1
_FIRST_TEXT_ID = 2


class FakeEngine:
    """See the module. `EOS_ID` ends a completion, `PLACEHOLDER_ID` stands for media and is never sampled."""

    def __init__(self, config: FakeConfig, actor_id: str) -> None:
        self._config = config
        self._actor_id = actor_id
        self._slots = asyncio.Semaphore(config.max_num_seqs)
        self._num_running = 0
        self._num_waiting = 0
        self._num_groups = 0
        self._dead = False
        self._going = asyncio.Event()  # cleared while paused: nothing finishes
        self._going.set()
        self._receivers: list[WeightReceiver] = []
        self._staged: Manifest | None = None
        self._adapters = Adapters("fake", config.max_lora_rank, config.max_loras)
        # When each version went live, ascending, on the monotonic clock.
        self._commit_times: list[float] = [0.0]
        self._versions: list[int] = [0]

    async def start(self) -> EngineInfo:
        """Ready after `start_s`."""
        await asyncio.sleep(self._config.start_s)
        return EngineInfo(
            name="fake",
            version="1",
            architecture="FakeForConditionalGeneration",
            max_context_tokens=self._config.max_context_tokens,
            vocab_size=self._config.vocab_size,
            num_workers=self._config.num_workers,
            suppressed_token_ids=(PLACEHOLDER_ID,),
            max_lora_rank=self._config.max_lora_rank,
        )

    # ------------------------------------------------------------------------------------------------ generation

    async def generate(self, request: EngineRequest) -> AsyncIterator[PromptInfo | list[Completion]]:
        """See `Engine.generate`."""
        self._num_groups += 1
        if self._num_groups == self._config.die_at_group:
            self._dead = True
        await self.check()
        if request.return_routed_experts:
            raise Unimplemented("returns.routed_experts", "the fake engine has no experts")
        self._adapters.find(request.model)
        if request.sampling.structured_output is not None:
            raise Unimplemented("sampling.structured_output", "the fake engine knows no grammars")
        info = with_prompt_logprobs(self._prompt_info(request), request.sampling, self._config.vocab_size)
        yield info
        max_tokens = self._max_tokens(request, len(info.expanded_ids))
        digest = hashlib.sha256(info.expanded_ids.tobytes() + b"".join(item.sha256 for item in request.media)).digest()
        num_samples = request.sampling.num_beams or request.sampling.n
        tokens = [self._tokens(request, digest, i, max_tokens) for i in range(num_samples)]
        finished: asyncio.Queue[Completion] = asyncio.Queue()
        tasks = [asyncio.create_task(self._sample(request, i, tokens[i], finished)) for i in range(len(tokens))]
        try:
            if request.sampling.num_beams:
                await asyncio.gather(*tasks)
                await self.check()
                yield best_beams(_drain(finished), request.sampling, len(info.expanded_ids))
                return
            num_left = len(tasks)
            while num_left:
                completions = [await finished.get(), *_drain(finished)]
                await self.check()
                num_left -= len(completions)
                yield completions
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _max_tokens(self, request: EngineRequest, num_prompt: int) -> int:
        room = self._config.max_context_tokens - num_prompt
        if room < 1:
            raise InvalidRequest("prompt", f"{num_prompt} tokens; the context has {self._config.max_context_tokens}")
        return min(request.sampling.max_tokens or room, room)

    async def _sample(
        self, request: EngineRequest, index: int, tokens: _Tokens, finished: asyncio.Queue[Completion]
    ) -> None:
        token_ids, logprobs, reason = tokens
        accepted_s = time.monotonic()
        self._num_waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._num_waiting -= 1
        self._num_running += 1
        try:
            start_s = time.monotonic() + self._config.first_token_s
            await asyncio.sleep(self._config.first_token_s + self._config.token_s * (len(token_ids) - 1))
            await self._going.wait()
        finally:
            self._num_running -= 1
            self._slots.release()
        completion = Completion(
            trajectory_id=f"{request.group_id}/{index}/{self._actor_id}",
            index=index,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            version_spans=self._spans(start_s, len(token_ids)),
            first_token_s=start_s - accepted_s,
            finished_s=time.monotonic() - accepted_s,
            text=_text(token_ids) if request.return_text else "",
            top_logprobs=top_logprobs(token_ids, logprobs, request.sampling.top_logprobs, self._config.vocab_size),
        )
        finished.put_nowait(completion)

    def _tokens(self, request: EngineRequest, prompt_digest: bytes, index: int, max_tokens: int) -> _Tokens:
        """A pure function of prompt, seed and index. Without a seed, seed 0 counts."""
        seed = (request.sampling.seed or 0) + index
        generator = np.random.default_rng([*np.frombuffer(prompt_digest, np.uint32).tolist(), seed])
        trace = self._config.lengths
        length = trace[seed % len(trace)] if trace else int(generator.integers(1, 2 * self._config.mean_tokens))
        length = max(length, request.sampling.min_tokens, max_tokens if request.sampling.ignore_eos else 0)
        reason = FinishReason.LENGTH if length > max_tokens or request.sampling.ignore_eos else FinishReason.STOP
        length = min(length, max_tokens)
        token_ids = generator.integers(_FIRST_TEXT_ID, self._config.vocab_size, length, dtype=np.int32)
        if reason is FinishReason.STOP:
            token_ids[-1] = EOS_ID
        return token_ids, -generator.random(length, dtype=np.float32), reason

    def _spans(self, start_s: float, num_tokens: int) -> tuple[VersionSpan, ...]:
        """Token t was sampled at `start_s + t * token_s`, by the version that was live then."""
        times = start_s + self._config.token_s * np.arange(num_tokens)
        lives = [bisect.bisect_right(self._commit_times, moment) - 1 for moment in times]
        edges = [0, *(t for t in range(1, num_tokens) if lives[t] != lives[t - 1]), num_tokens]
        return tuple(VersionSpan(self._versions[lives[start]], start, end) for start, end in itertools.pairwise(edges))

    def _prompt_info(self, request: EngineRequest) -> PromptInfo:
        """Text is one id per byte; each media item is one placeholder, expanded to `tokens_per_image`."""
        unexpanded = self._tokenize(request)
        is_expanded = isinstance(request.prompt, TokenPrompt) and bool(request.prompt.placeholders)
        if is_expanded:
            unexpanded = self._collapse(request.prompt, request.media)
        num_media = unexpanded.count(PLACEHOLDER_ID)
        if num_media != len(request.media):
            raise InvalidRequest("media", f"{len(request.media)} items came, the prompt has room for {num_media}")
        expanded: list[int] = []
        uses: list[MediaUse] = []
        for token_id in unexpanded:
            if token_id == PLACEHOLDER_ID:
                item = request.media[len(uses)]
                length = self._num_tokens(item)
                run = PlaceholderRange(len(expanded), length)
                tensors = processed(item) if request.return_processed else ()
                grid = (length // self._config.tokens_per_image, 2, 2 * self._config.tokens_per_image)
                uses.append(MediaUse(item.sha256, run, length, grid, item.modality, tensors))
                expanded += [PLACEHOLDER_ID] * length
            else:
                expanded.append(token_id)
        return PromptInfo(
            group_id=request.group_id,
            actor_id=self._actor_id,
            unexpanded_ids=np.asarray([] if is_expanded else unexpanded, np.int32),
            expanded_ids=np.asarray(expanded, np.int32),
            media=tuple(uses),
            suppressed_token_ids=(PLACEHOLDER_ID,),
        )

    def _num_tokens(self, item: EngineMedia) -> int:
        num_frames = len(item.content) if isinstance(item.content, np.ndarray) else 1
        return num_frames * self._config.tokens_per_image

    def _collapse(self, prompt: Prompt, media: tuple[EngineMedia, ...]) -> list[int]:
        """Expanded ids without what was expanded; each range must be what this engine makes of an item."""
        assert isinstance(prompt, TokenPrompt)
        ids, end = [], 0
        for i, (run, item) in enumerate(zip(prompt.placeholders, media, strict=True)):
            length = self._num_tokens(item)
            if prompt.ids[run.offset : run.offset + run.length] != (PLACEHOLDER_ID,) * length:
                raise InvalidRequest(
                    f"tokens.placeholders[{i}]",
                    f"is {run.length} tokens at {run.offset}; the processor yields {length} for media[{i}]",
                )
            ids += [*prompt.ids[end : run.offset], PLACEHOLDER_ID]
            end = run.offset + run.length
        return [*ids, *prompt.ids[end:]]

    def _tokenize(self, request: EngineRequest) -> list[int]:
        match request.prompt:
            case TokenPrompt(token_ids):
                return list(token_ids)
            case TextPrompt(text):
                return [PLACEHOLDER_ID] * len(request.media) + self._text_ids(text)
            case ChatPrompt(messages):
                ids: list[int] = []
                for message in messages:
                    ids += self._text_ids(message.role)
                    for part in message.parts:
                        ids += [PLACEHOLDER_ID] if isinstance(part, MediaPart) else self._text_ids(part.text)
                return ids

    def _text_ids(self, text: str) -> list[int]:
        return [_FIRST_TEXT_ID + byte % (self._config.vocab_size - _FIRST_TEXT_ID) for byte in text.encode()]

    # ------------------------------------------------------------------------------------------------ weights

    async def open_epoch(self, spec: EpochSpec) -> None:
        """See `Engine.open_epoch`."""
        transfer = await asyncio.to_thread(_import_transfer)
        self._leave()
        self._receivers = [transfer.WeightReceiver() for _ in range(self._config.num_workers)]
        jobs = [receiver.join(spec, spec.rank + i) for i, receiver in enumerate(self._receivers)]
        await _finish(jobs, spec.timeout_s)

    async def stage(self, manifest: Manifest, timeout_s: float) -> tuple[int, ...]:
        """See `Engine.stage`."""
        self._staged = None
        self._adapters.check(manifest)
        results: list[tuple[int, ...]] = await _finish(
            [receiver.receive(manifest, _Discard()) for receiver in self._receivers], timeout_s, self._stage_error
        )
        if any(result != results[0] for result in results):
            raise RuntimeError("workers received different bytes")
        self._staged = manifest
        return results[0]

    def _stage_error(self) -> type[StageTimeout]:
        return StageBlocked if any(receiver.is_blocked for receiver in self._receivers) else StageTimeout

    async def commit(self, policy_version: int) -> float:
        """See `Engine.commit`."""
        if self._staged is None or self._staged.policy_version != policy_version:
            raise NotStaged(f"version {policy_version} is not staged")
        await asyncio.sleep(self._config.commit_s)
        for receiver in self._receivers:
            receiver.take(policy_version, _Discard)
        self._adapters.commit(self._staged)
        self._staged = None
        self._commit_times.append(time.monotonic())
        self._versions.append(policy_version)
        return self._config.commit_s

    async def pause(self) -> None:
        """See `Engine.pause`."""
        await self.check()
        self._going.clear()

    async def resume(self) -> None:
        """See `Engine.resume`."""
        self._going.set()

    async def abort_epoch(self) -> None:
        """See `Engine.abort_epoch`."""
        self._leave()

    def _leave(self) -> None:
        self._staged = None
        receivers, self._receivers = self._receivers, []
        for receiver in receivers:
            receiver.leave()

    # ------------------------------------------------------------------------------------------------ life

    def adapters(self) -> tuple[str, ...]:
        """See `Engine.adapters`."""
        return self._adapters.names

    def load(self) -> EngineLoad:
        """See `Engine.load`."""
        return EngineLoad(self._num_running, self._num_waiting)

    async def check(self) -> None:
        """See `Engine.check`."""
        if self._dead:
            raise EngineDead("the fake engine has died, as configured")

    async def stop(self) -> None:
        """See `Engine.stop`."""
        self._leave()


def _import_transfer() -> ModuleType:
    """It takes torch along: seconds, in which others are answered. Most tests need none of it."""
    from actor import transfer

    return transfer


class _Discard:
    """Receives weights for nothing."""

    def add(self, tensors: object) -> None:
        """See `Staging.add`."""

    def finish(self) -> None:
        """See `Staging.finish`."""

    def discard(self) -> None:
        """See `Staging.discard`."""


async def _finish(
    jobs: "list[Future[Any]]", timeout_s: float, late: Callable[[], type[StageTimeout]] = lambda: StageTimeout
) -> list[Any]:
    """Results of background jobs; a job that fails, as one whose peers are gone, is late."""
    try:
        return await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, jobs)), timeout_s)
    except TimeoutError:
        raise late()(f"the workers were not done within {timeout_s:.1f} s") from None
    except RuntimeError as error:
        raise late()(f"a worker could not finish its part: {error}") from error


def _drain(queue: asyncio.Queue[Completion]) -> list[Completion]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


def _text(token_ids: IntArray) -> str:
    """Printable text of made-up tokens."""
    return "".join(chr(ord("a") + token_id % 26) for token_id in token_ids if token_id != EOS_ID)
