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
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from tests.injection.fault import Injector, do

if TYPE_CHECKING:
    import torch

    from common.collective import BroadcastGroup


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


def on_engine(injector: Injector, engine: Any) -> None:
    """All phases of an actor. Its broadcasts are wrapped late: an actor imports torch when it needs it."""
    open_epoch, stage, commit, generate = engine.open_epoch, engine.stage, engine.commit, engine.generate
    wrap_broadcasts = functools.cache(lambda: on_broadcasts(injector, sends=False))

    async def wrapped_open_epoch(spec: Any) -> None:
        wrap_broadcasts()
        await open_epoch(spec)

    async def wrapped_stage(manifest: Any, timeout_s: float) -> Any:
        injector.version = manifest.policy_version
        return await stage(manifest, timeout_s)

    async def wrapped_commit(policy_version: int) -> float:
        injector.at("commit")
        result: float = await commit(policy_version)
        return result

    async def wrapped_generate(request: Any) -> AsyncIterator[Any]:
        async for event in generate(request):
            injector.at("between")
            yield event

    engine.open_epoch, engine.stage = wrapped_open_epoch, wrapped_stage
    engine.commit, engine.generate = wrapped_commit, wrapped_generate


def on_learner(injector: Injector) -> None:
    """The phases of a rank; those that only rank 0 has do not come on the others."""
    from common.client import GrpcClient
    from learner.policy import Policy
    from learner.weights import snapshot
    from learner.weights.snapshot import Snapshotter

    def before(owner: Any, name: str, action: Callable[..., None]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            action(*arguments)
            return original(*arguments, **options)

        setattr(owner, name, wrapped)

    def taking(_: Any, version: int) -> None:
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
    on_broadcasts(injector, sends=True)
