"""Where in the product the phases of an update are: its methods, wrapped for a process that a fault is meant for.

| phase | actor | learner's rank 0 | another rank |
|---|---|---|---|
| gather | | after the first parameter | after the first parameter |
| open | everybody has come, before the first byte | the same | |
| stage | after the first bucket | after the first bucket | |
| commit | before the swap | before the calls | |
| between | while it generates | in a training step | in a training step |
"""

import functools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import structlog

from tests.injection.fault import Injector, do

if TYPE_CHECKING:
    import torch

    from common.collective import BroadcastGroup
    from learner.training.step import StepStats
    from learner.types import Group

log = structlog.get_logger()


def on_broadcasts(injector: Injector, *, sends: bool) -> None:
    """Phases open and stage, on both ends. A group's first broadcast is one byte: who is in."""
    from common.collective import BroadcastGroup

    broadcast = BroadcastGroup.broadcast

    def wrapped(self: "BroadcastGroup", buffer: "torch.Tensor") -> None:
        if buffer.numel() == 1:
            injector.at("open")
            broadcast(self, buffer)
            return
        fault = injector.due("stage")
        if fault is None:
            broadcast(self, buffer)
        elif fault.kind != "corrupt":
            broadcast(self, buffer)
            do(fault)
        elif sends:  # on the wire alone: the memory is sent again to the next epoch
            damaged = buffer.clone()
            damaged[0] ^= 1
            broadcast(self, damaged)
        else:
            broadcast(self, buffer)
            buffer[0] ^= 1

    BroadcastGroup.broadcast = wrapped  # type: ignore[method-assign]


def on_receiver(injector: Injector) -> None:
    """Phases open and stage of an actor, in the process where the weights arrive."""
    from actor.weights.transfer import WeightReceiver

    def receiving(_: Any, manifest: Any, __: Any) -> None:
        injector.version = manifest.policy_version

    before(WeightReceiver, "receive", receiving)
    on_broadcasts(injector, sends=False)


def on_engine(injector: Injector, engine: Any) -> None:
    """All phases of an actor that happen in this process.

    What receives is wrapped late: an actor imports torch when it needs it.
    """
    open_epoch, stage, commit, generate = engine.open_epoch, engine.stage, engine.commit, engine.generate
    wrap_receiver = functools.cache(lambda: on_receiver(injector))

    async def wrapped_open_epoch(spec: Any) -> None:
        wrap_receiver()
        await open_epoch(spec)

    async def wrapped_stage(manifest: Any, timeout_s: float) -> Any:
        injector.version = manifest.policy_version
        return await stage(manifest, timeout_s)

    async def wrapped_commit(policy_version: int) -> float:
        injector.at("commit")
        result: float = await commit(policy_version)
        return result

    async def wrapped_generate(request: Any) -> AsyncIterator[Any]:
        async with aclosing(generate(request)) as events:
            async for event in events:
                injector.at("between")
                yield event

    engine.open_epoch, engine.stage = wrapped_open_epoch, wrapped_stage
    engine.commit, engine.generate = wrapped_commit, wrapped_generate


def on_learner(injector: Injector) -> None:
    """The phases of a rank; those that only rank 0 has do not come on the others."""
    from common.client import GrpcClient
    from learner.reporting.report import Reporter
    from learner.training.policy import Policy
    from learner.weights import snapshot
    from learner.weights.snapshot import Snapshotter

    def taking(_: Any, version: int, *__: Any) -> None:
        injector.version = version

    def gathered(parameter: "torch.Tensor") -> "torch.Tensor":
        whole = full(parameter)
        injector.at("gather")
        return whole

    full = snapshot._full
    snapshot._full = gathered
    before(Snapshotter, "take", taking)
    before(Policy, "_update", lambda *_: injector.at("between"))
    before(GrpcClient, "commit", lambda *_: injector.at("commit"))
    before(Reporter, "step", lambda _, *report: log.info("compared", **compared(*report[:3])))
    on_broadcasts(injector, sends=True)


def compared(version: int, groups: "Sequence[Group]", stats: "StepStats") -> dict[str, Any]:
    """Of the step that led to `version`: the largest difference of logprobs, and the tokens that it is about.

    `num_tokens` is what the step says, `tokens` counts those that each actor has sampled by the policy of the step.
    """
    tokens = Counter[str]()
    for group in groups:
        for completion in group.completions:
            spans = [span for span in completion.version_spans if span.policy_version == version - 1]
            tokens[group.prompt.actor_id] += sum(span.end - span.start for span in spans)
    diff = stats.parity_max_abs_diff
    return {"step": version, "max_abs_diff": diff, "num_tokens": stats.parity_tokens, "tokens": +tokens}


def before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Have a method of `owner` do `action`, with its positional arguments, before all else."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        action(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)
