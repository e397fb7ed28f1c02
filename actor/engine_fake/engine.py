"""An engine without a model, for tests of scale and faults. It keeps the whole contract of `actor.engine.Engine`.

Tokens, logprobs and lengths are a function of the prompt, the seed and the index, and of nothing else; times are the
configured ones. Weights are really received, over a real process group, and thrown away at the commit.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator

import numpy as np

from actor.config import FakeConfig
from actor.engine import EngineInfo, EngineLoad, EngineRequest
from actor.engine_fake.answers import best_beams, top_logprobs, with_prompt_logprobs
from actor.engine_fake.prompts import FIRST_TEXT_ID, PLACEHOLDER_ID, FakePrompts
from actor.engine_fake.updates import FakeUpdates
from actor.validation.sampling import check_prompt_logprobs
from actor.weights.adapters import Adapters
from common.errors import EngineDead, InvalidRequest, Unimplemented
from common.types import (
    Completion,
    EpochSpec,
    FinishReason,
    FloatArray,
    IntArray,
    Manifest,
    PromptInfo,
)

_Tokens = tuple[IntArray, FloatArray, FinishReason]

EOS_ID = 0


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
        self._adapters = Adapters("fake", config.max_lora_rank, config.max_loras)
        self._prompts = FakePrompts(config, actor_id)
        self._updates = FakeUpdates(config, self._adapters)

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
        info = self._prompts.understand(request)
        check_prompt_logprobs(request.sampling, len(info.expanded_ids), request.max_message_bytes)
        [now] = self._updates.spans(time.monotonic(), 1)
        info = with_prompt_logprobs(info, request.sampling, self._config.vocab_size, now.policy_version)
        max_tokens = self._max_tokens(request, len(info.expanded_ids))
        yield info
        digest = hashlib.sha256(info.expanded_ids.tobytes() + b"".join(item.sha256 for item in request.media)).digest()
        num_samples = request.sampling.num_beams or request.sampling.n
        tokens = [self._tokens(request, digest, i, max_tokens) for i in range(num_samples)]
        finished: asyncio.Queue[Completion] = asyncio.Queue()
        tasks = [asyncio.create_task(self._sample(request, i, tokens[i], finished)) for i in range(len(tokens))]
        try:
            if request.sampling.num_beams:
                await asyncio.gather(*tasks)
                await self.check()
                yield best_beams(_drain(finished), request, len(info.expanded_ids), self._actor_id)
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
            trajectory_id=request.trajectory_id(index, self._actor_id),
            index=index,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            version_spans=self._updates.spans(start_s, len(token_ids)),
            first_token_s=start_s - request.accepted_at,
            finished_s=time.monotonic() - request.accepted_at,
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
        token_ids = generator.integers(FIRST_TEXT_ID, self._config.vocab_size, length, dtype=np.int32)
        if reason is FinishReason.STOP:
            token_ids[-1] = EOS_ID
        return token_ids, -generator.random(length, dtype=np.float32), reason

    # ------------------------------------------------------------------------------------------------ weights

    async def open_epoch(self, spec: EpochSpec) -> None:
        """See `Engine.open_epoch`."""
        await self._updates.open_epoch(spec)

    async def stage(self, manifest: Manifest, timeout_s: float) -> tuple[int, ...]:
        """See `Engine.stage`."""
        return await self._updates.stage(manifest, timeout_s)

    async def commit(self, policy_version: int) -> float:
        """See `Engine.commit`."""
        return await self._updates.commit(policy_version)

    async def pause(self) -> None:
        """See `Engine.pause`."""
        await self.check()
        self._going.clear()

    async def resume(self) -> None:
        """See `Engine.resume`."""
        self._going.set()

    async def abort_epoch(self) -> None:
        """See `Engine.abort_epoch`."""
        self._updates.leave()

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
        self._updates.leave()


def _drain(queue: asyncio.Queue[Completion]) -> list[Completion]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


def _text(token_ids: IntArray) -> str:
    """Printable text of made-up tokens."""
    return "".join(chr(ord("a") + token_id % 26) for token_id in token_ids if token_id != EOS_ID)
