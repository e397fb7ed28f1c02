"""A real vLLM engine behind the actor's weight protocol in the test's own process, and a learner that publishes to it.

Everything is as in a run but for gRPC: the broadcast goes through a real process group to vLLM's worker process.
"""

import asyncio
import copy
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from actor.config import VllmConfig
from actor.engine import EngineInfo, EngineMedia, EngineRequest
from actor.engine_thread import EngineThread
from actor.engine_vllm.engine import VllmEngine
from actor.weights.policy_state import PolicyState
from common.client import ActorClient, SampledGroup
from common.media import content_hash, decode_image
from common.types import (
    ActorState,
    ActorStatus,
    ChatPrompt,
    Completion,
    EpochSpec,
    Manifest,
    Prompt,
    PromptInfo,
    SamplingParams,
)
from learner.batch.processing import PromptProcessor
from learner.config.model import Adapter
from learner.model.load import load_policy
from learner.model.parts import find_modules
from learner.rollouts.members import Member
from learner.types import Group, PromptSample
from learner.weights.epoch import Epoch, open_epoch
from learner.weights.snapshot import Snapshot, Snapshotter
from learner.weights.transport import TorchTransport
from tests.helpers.groups import SUPPRESSED, reference_logits

MAX_PIXELS = 2**20
TIMEOUT_S = 60.0
CONFIG = VllmConfig(
    dtype="float32",
    max_model_len=2048,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    enforce_eager=True,
    max_images=2,
    shutdown_timeout_s=2,
)


def media_of(images: Iterable[bytes]) -> tuple[EngineMedia, ...]:
    """Image files as the engine takes them."""
    return tuple(EngineMedia(content_hash(image), decode_image(image, "image", MAX_PIXELS)) for image in images)


class LiveActor:
    """The engine and its policy state; serves the checkpoint as version 0 from the start."""

    def __init__(self, model_dir: Path, **config: Any) -> None:
        self.vllm = VllmEngine(model_dir, CONFIG.model_copy(update=config), "actor-1")
        self.engine = EngineThread(self.vllm)
        self.policy = PolicyState(self.engine)
        self.info: EngineInfo
        self._processor = PromptProcessor(model_dir)
        self._num_groups = 0

    async def start(self) -> None:
        """Load the model; tens of seconds."""
        await asyncio.to_thread(self.vllm.load_model)  # where no loop runs, as in an actor
        self.info = await self.engine.start()
        self.policy.loaded(standalone=True)

    def stream(
        self, sample: PromptSample, sampling: SamplingParams, prompt: Prompt | None = None, model: str = ""
    ) -> AsyncIterator[PromptInfo | list[Completion]]:
        """The events of one group. `prompt` replaces the chat that the sample's messages are."""
        self._num_groups += 1
        request = EngineRequest(
            group_id=f"g{self._num_groups}",
            prompt=prompt or ChatPrompt(sample.messages),
            media=media_of(sample.images),
            sampling=sampling,
            model=model,
        )
        return self.engine.generate(request)

    async def ask(
        self, prompt: Prompt, media: tuple[EngineMedia, ...] = (), *, return_processed: bool = False, **sampling: Any
    ) -> SampledGroup:
        """One whole group of any prompt, with its texts; completions by index."""
        self._num_groups += 1
        request = EngineRequest(
            f"g{self._num_groups}",
            prompt,
            media,
            SamplingParams(**sampling),
            return_text=True,
            return_processed=return_processed,
        )
        infos: list[PromptInfo] = []
        completions: list[Completion] = []
        async for event in self.engine.generate(request):
            if isinstance(event, PromptInfo):
                infos.append(event)
            else:
                completions += event
        [info] = infos
        return SampledGroup(info, tuple(sorted(completions, key=lambda completion: completion.index)))

    async def sample(
        self, sample: PromptSample, prompt: Prompt | None = None, model: str = "", **sampling: Any
    ) -> SampledGroup:
        """One whole group; completions in the order in which they came."""
        infos: list[PromptInfo] = []
        completions: list[Completion] = []
        async for event in self.stream(sample, SamplingParams(**sampling), prompt, model):
            if isinstance(event, PromptInfo):
                assert not completions
                infos.append(event)
            else:
                completions += event
        [info] = infos
        return SampledGroup(info, tuple(completions))

    async def group(self, sample: PromptSample, model: str = "", **sampling: Any) -> Group:
        """One group as the trainer gets it, with made-up rewards of which no two are equal."""
        sampled = await self.sample(sample, model=model, **sampling)
        completions = tuple(sorted(sampled.completions, key=lambda completion: completion.index))
        processed = self._processor.process(sample)
        rewards = np.linspace(0, 1, len(completions), dtype=np.float32)
        return Group(sampled.prompt.group_id, sample.row, sample, processed, sampled.prompt, completions, rewards)


@asynccontextmanager
async def running(model_dir: Path, **config: Any) -> AsyncIterator[LiveActor]:
    """A started actor. What vLLM did to the environment of this process is undone at the end."""
    environment = dict(os.environ)
    actor = LiveActor(model_dir, **config)
    try:
        await actor.start()
        yield actor
    finally:
        await actor.engine.stop()
        os.environ.clear()
        os.environ.update(environment)


class _PolicyClient:
    """The weight calls of `ActorClient`, answered by a `PolicyState`."""

    def __init__(self, policy: PolicyState) -> None:
        self._policy = policy

    async def open_epoch(self, spec: EpochSpec) -> None:
        await self._policy.open_epoch(spec)

    async def status(self, *, timeout_s: float = 5.0) -> ActorStatus:
        policy = self._policy
        return ActorStatus("actor-1", policy.state, policy.policy_version, policy.run_id, policy.epoch, -1, 0, 0, 1)

    async def stage(self, run_id: str, epoch: int, manifest: Manifest, *, timeout_s: float) -> tuple[int, ...]:
        return (await self._policy.stage(run_id, epoch, manifest, timeout_s))[0]

    async def commit(self, run_id: str, epoch: int, policy_version: int, *, timeout_s: float) -> float:
        return await self._policy.commit(run_id, epoch, policy_version, timeout_s)

    async def abort(self, run_id: str, epoch: int, *, timeout_s: float = 5.0) -> None:
        await self._policy.abort(run_id, epoch)


class WeightSource:
    """The learner's side: one run that publishes models to a `LiveActor`, each as the next version."""

    def __init__(self, actor: LiveActor) -> None:
        self._actor = actor
        client = cast("ActorClient", _PolicyClient(actor.policy))
        status = ActorStatus("actor-1", ActorState.SERVING, 0, "", 0, -1, 0, 0, num_workers=actor.info.num_workers)
        self._member = Member("in-process", client, 1, "actor-1", ActorState.SERVING, status=status)
        self._transport = TorchTransport("127.0.0.1")
        self._last_epoch = 0
        self._epoch: Epoch | None = None
        self.version = 0

    def spec(self, epoch: int, timeout_s: float = TIMEOUT_S) -> EpochSpec:
        """Of an epoch with this actor alone."""
        world_size = 1 + self._actor.info.num_workers
        return EpochSpec("run", epoch, "127.0.0.1", self._transport.port, world_size, 0, "gloo", timeout_s)

    async def open(self) -> Epoch:
        """The epoch that is open, or the next one."""
        if self._epoch is None:
            self._last_epoch += 1
            self._epoch = await open_epoch(self.spec(self._last_epoch), [self._member], self._transport)
        return self._epoch

    async def abort(self) -> None:
        """End the epoch."""
        epoch, self._epoch = self._epoch, None
        if epoch is not None:
            await epoch.abort()

    async def publish(self, model: Any, *, full: bool = True, says_vision: bool | None = None) -> int:
        """Make `model` what the actor serves; its version. `says_vision` replaces what the manifest says truly."""
        return await self.publish_snapshot(snapshot(model, self.version + 1, says_vision), full=full)

    async def publish_snapshot(self, taken: Snapshot, *, full: bool = True, merged: bool = False) -> int:
        """Make a snapshot what the actor serves."""
        await (await self.open()).send(taken.update(full=full, merged=merged))
        self.version = taken.version
        return self.version


def snapshot(model: Any, version: int, says_vision: bool | None = None) -> Snapshot:
    """A snapshot of a model of this process, in several buckets."""
    taken = Snapshotter(model, find_modules(model, "vision_tower"), is_sender=True, bucket_bytes=2**19).take(version)
    assert taken is not None
    return taken if says_vision is None else replace(taken, trains_vision=says_vision)


@torch.no_grad()
def masked_logprobs(model: Any, hf_processor: Any, group: Group, completion: Completion) -> Tensor:
    """log-probabilities `[n, V]` by transformers alone, one sequence at a time, without the placeholder ids."""
    logits = reference_logits(model, hf_processor, group, completion).float()
    logits[:, list(SUPPRESSED)] = -torch.inf
    return torch.log_softmax(logits, dim=-1)


def largest_difference(model: Any, hf_processor: Any, group: Group, span: slice = slice(None)) -> float:
    """Largest |engine's logprob - transformers'| over the sampled tokens of a group, or a span of each completion."""
    worst = 0.0
    for completion in group.completions:
        ids = torch.from_numpy(completion.token_ids).long()[:, None]
        expected = masked_logprobs(model, hf_processor, group, completion).gather(1, ids).squeeze(1)
        worst = max(worst, float((expected - torch.from_numpy(completion.logprobs)).abs()[span].max()))
    return worst


class Trained:
    """A policy whose adapter has random weights, and the same model as PEFT puts it together."""

    def __init__(self, model_dir: Path, seed: int, targets: str | tuple[str, ...] = "all-linear") -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import AutoModelForImageTextToText

        adapter = Adapter(rank=4, alpha=8, target_modules=targets)
        policy, _ = load_policy(model_dir, frozen=["vision_tower"], adapter=adapter)
        self.base = AutoModelForImageTextToText.from_pretrained(model_dir).eval()
        self.model = copy.deepcopy(self.base)
        config: Any = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=targets if isinstance(targets, str) else list(targets),
            exclude_modules=".*visual.*",
        )
        inject_adapter_in_model(config, self.model)
        generator = torch.Generator().manual_seed(seed)
        matrices = dict(policy.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                    matrices.pop(name).copy_(parameter)
        assert not any(".lora_" in name for name in matrices)
        self._snapshotter = Snapshotter(policy, ["model.visual"], is_sender=True, bucket_bytes=2**19)

    def snapshot(self, version: int, name: str = "policy") -> Snapshot:
        taken = self._snapshotter.take(version)
        assert taken is not None
        assert taken.adapter is not None
        return replace(taken, adapter=replace(taken.adapter, name=name))
