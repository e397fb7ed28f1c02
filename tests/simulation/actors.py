"""Simulated actors: the real state machine (`actor.weights.policy_state`) around an engine that only waits.

The engine knows which bytes its live weights are made of. A token that is sampled from anything but one whole policy of
the version that is said ends the schedule.
"""

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from actor.weights.policy_state import PolicyState
from common.client import SampledGroup
from common.errors import (
    Draining,
    EngineDead,
    InvalidRequest,
    NotStaged,
    QueueFull,
    RendezvousUnreachable,
    StageTimeout,
    TooLarge,
    Unreachable,
    WeightsPending,
)
from common.types import (
    ActorState,
    ActorStatus,
    EpochSpec,
    Manifest,
    PromptInfo,
    RolloutRequest,
    ServerInfo,
)
from tests.helpers.fakes import PLACEHOLDER_ID, make_completion, process
from tests.simulation.network import Call, Link
from tests.simulation.policy import Policy
from tests.simulation.wire import Peer, Wire

if TYPE_CHECKING:
    from tests.simulation.learner import SimLearner
    from tests.simulation.world import World

T = TypeVar("T")

NUM_TOKENS = 3


class SimEngine:
    """`actor.engine.Engine`, as far as `PolicyState` needs it."""

    def __init__(self, actor: "SimActor", wire: Wire, rng: random.Random) -> None:
        self.policy: Policy | None = None
        """What is live; None: torn, or never loaded over the wire."""
        self.version = 0
        self.torn_next = False
        self._actor = actor
        self._wire = wire
        self._rng = rng
        self._peers: list[Peer] = []
        self._staged: tuple[int, list[int]] | None = None
        self._kept: tuple[int, list[int]] | None = None
        self._live: dict[str, int] = {}
        self._moving = asyncio.Event()
        self._moving.set()

    async def open_epoch(self, spec: EpochSpec) -> None:
        self.leave()
        if not self._actor.reaches_rendezvous:
            await asyncio.sleep(spec.timeout_s / 2)
            raise RendezvousUnreachable("no route")
        self._peers = peers = [
            self._wire.enter(spec, spec.rank + i, self._actor.link) for i in range(self._actor.num_workers)
        ]
        await self._all([peer.opened() for peer in peers])

    async def stage(self, manifest: Manifest, timeout_s: float) -> tuple[int, ...]:
        self._staged = None
        if self._actor.refuses_updates:
            raise InvalidRequest("manifest.parameters", "these are of another model")
        if manifest.adapter and not self._actor.max_lora_rank:
            raise InvalidRequest("manifest.adapter", "this actor takes none")
        kept, self._kept = self._kept, None  # gone if this fails
        if manifest.base_version >= 0 and (kept is None or kept[0] != manifest.base_version):
            raise InvalidRequest("manifest.base_version", "is not kept here")
        received = await self._all([peer.receive(len(manifest.buckets)) for peer in self._peers])
        if any(buckets != received[0] for buckets in received):
            raise RuntimeError("workers received different bytes")
        buckets = received[0]
        if manifest.base_version >= 0:
            assert kept is not None
            buckets = [old + change for old, change in zip(kept[1], buckets, strict=True)]
        self._staged = (manifest.policy_version, buckets)
        if not manifest.wrong_buckets(buckets):
            pairs = zip(buckets, manifest.buckets, strict=True)
            self._kept = (manifest.policy_version, [value for value, bucket in pairs if bucket.keep])
        return tuple(buckets)

    async def _all(self, waits: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(wait) for wait in waits]
        except BaseExceptionGroup as errors:
            raise StageTimeout(f"a worker could not finish its part: {errors.exceptions[0]}") from errors
        await self._actor.awake()
        return [task.result() for task in running]

    async def commit(self, policy_version: int) -> float:
        if self._staged is None or self._staged[0] != policy_version:
            raise NotStaged(f"version {policy_version} is not staged")
        buckets, self._staged = self._staged[1], None
        pause_s = self._rng.random() * 0.05
        self._moving.clear()
        self.policy = None
        for bucket in buckets:
            await asyncio.sleep(pause_s / len(buckets))
            await self._actor.awake()
            self._live.update(Policy.parameter(bucket))
            if self.torn_next:
                raise RuntimeError("the commit broke half-way")
        self.policy = Policy.of(self._live)
        self.version = policy_version
        self._moving.set()
        return pause_s

    async def abort_epoch(self) -> None:
        self.leave()

    def leave(self) -> None:
        self._staged = None
        peers, self._peers = self._peers, []
        for peer in peers:
            peer.abort()

    async def token(self, seconds: float) -> Policy:
        """One step of all completions of a group; the policy that sampled it."""
        await asyncio.sleep(seconds)
        await self._actor.awake()
        # A step and a swap never overlap, also if the process was stopped between them.
        while not self._moving.is_set():
            await self._moving.wait()
            await self._actor.awake()
        world = self._actor.world
        world.check(self.policy is not None, f"{self._actor.actor_id} samples from torn weights")
        assert self.policy is not None
        world.check(
            self.policy.version == self.version,
            f"{self._actor.actor_id} serves {self.policy} as version {self.version}",
        )
        return self.policy


class SimActor:
    """One address, and the actor processes that live there one after the other."""

    def __init__(self, world: "World", address: str, rng: random.Random) -> None:
        self.world = world
        self.address = address
        self.rng = rng
        self.link = Link(rng, self)
        self.num_workers = rng.choice((1, 1, 1, 2))
        self.token_s = rng.uniform(0.02, 0.3)
        self.slowness = 1
        self.incarnation = 0
        self._number = world.plan.addresses.index(address)
        self.up = False
        self.busy = False
        self.corrupt_next = False
        self.reaches_rendezvous = True
        self.refuses_updates = False
        self.refuses_groups = False
        self.tasks: set[asyncio.Task[object]] = set()
        self._awake = asyncio.Event()
        self._awake.set()
        self._working = asyncio.Event()
        self._num_running = 0

    @property
    def actor_id(self) -> str:
        return f"{self.address}#{self.incarnation}"

    @property
    def max_lora_rank(self) -> int:
        """Of every other actor it is set right only before its second life."""
        return 0 if self.incarnation == 1 and self._number % 2 else 8

    # ------------------------------------------------------------------------------------------------ life and death

    def start(self) -> None:
        """A new process; it listens once the model is loaded."""
        self.incarnation += 1
        self.up, self.busy, self.corrupt_next = True, False, False
        self._working.set()
        self._num_running = 0
        self.engine = SimEngine(self, self.world.wire, self.rng)
        self.policy = PolicyState(self.engine)  # type: ignore[arg-type]
        self.policy.on_change = self._exit_if_failed
        self.policy.loaded(standalone=False)
        self.world.processes[self.actor_id] = (self.policy, self.engine)

    def kill(self) -> None:
        if not self.up:
            return
        self.up = False
        self.thaw()
        for call in [*self.link.calls]:
            call.reset()
        for task in [*self.tasks]:
            task.cancel()
        if self.policy._commit is not None:
            self.policy._commit[1].cancel()
        self.engine.leave()

    def _exit_if_failed(self) -> None:
        """As `actor.process`: a failed engine ends the process."""
        if self.policy.state is ActorState.FAILED:
            asyncio.get_running_loop().call_later(0.2, self._exit, self.incarnation)

    def _exit(self, incarnation: int) -> None:
        if self.incarnation == incarnation:
            self.kill()
            self.world.later(self.rng.uniform(0.1, 3), self.restart)

    def restart(self) -> None:
        if not self.up:
            self.start()

    def drain(self, grace_s: float) -> None:
        """SIGTERM."""
        if self.up:
            self.policy.drain()
            asyncio.get_running_loop().call_later(grace_s, self._exit, self.incarnation)

    def freeze(self) -> None:
        self._awake.clear()
        self.link.block()

    def thaw(self) -> None:
        self._awake.set()
        self.link.free()

    def not_busy(self) -> None:
        self.busy = False

    def reach_rendezvous(self) -> None:
        self.reaches_rendezvous = True

    def take_updates(self) -> None:
        self.refuses_updates = False

    def faster(self) -> None:
        self.slowness = 1

    def tear_next_commit(self) -> None:
        if self.up:
            self.engine.torn_next = True

    async def awake(self) -> None:
        await self._awake.wait()

    def hang(self) -> None:
        """The engine stops; the server goes on answering."""
        self._working.clear()

    def work(self) -> None:
        self._working.set()

    # ------------------------------------------------------------------------------------------------ what it serves

    def status(self) -> ActorStatus:
        policy = self.policy
        return ActorStatus(
            self.actor_id,
            policy.state,
            policy.policy_version,
            policy.run_id,
            policy.epoch,
            policy.staged_version,
            self._num_running,
            0,
            self.num_workers,
            self.max_lora_rank,
        )

    async def generate(self, request: RolloutRequest) -> SampledGroup:
        """As `actor.services.rollout`, with all completions in step."""
        if self.policy.state is not ActorState.SERVING:
            self.world.refused[self.policy.state.value] += 1
        match self.policy.state:
            case ActorState.DRAINING:
                raise Draining("this actor is draining")
            case ActorState.FAILED:
                raise EngineDead("the engine of this actor has failed")
            case ActorState.SERVING if self.policy.policy_version >= request.min_policy_version:
                pass
            case _:
                raise WeightsPending("not yet")
        self.policy.refuse_unless_of(request.run_id)
        if self.refuses_groups:
            if not self.world.has_finished_groups():  # its word would count
                raise QueueFull(retry_after_s=1.0)
            raise TooLarge("sampling.n", "more than this actor takes")
        if self.busy:
            raise QueueFull(retry_after_s=self.rng.random())
        actor_id = self.actor_id
        self._num_running += 1
        try:
            policies = []
            for _ in range(NUM_TOKENS):
                await self._working.wait()
                policies.append(await self.engine.token(self.token_s * self.slowness * self.rng.uniform(0.5, 2)))
        finally:
            self._num_running -= 1
        self.policy.refuse_unless_of(request.run_id)  # as before each response
        sample = self.world.sample_of(request)
        ids = process(sample).input_ids
        spans = [
            (version, len([*tokens])) for version, tokens in itertools.groupby(policy.version for policy in policies)
        ]
        prompt = PromptInfo(request.group_id, actor_id, ids, ids, (), (PLACEHOLDER_ID,))
        completions = tuple(make_completion(request.group_id, i, actor_id, spans) for i in range(request.sampling.n))
        self.world.sampled(completions, {policy.run for policy in policies})
        return SampledGroup(prompt, completions)


class SimClient:
    """An `ActorClient` on the simulated network."""

    def __init__(self, actor: SimActor, learner: "SimLearner") -> None:
        self._actor = actor
        self._learner = learner
        self.address = actor.address
        self._calls: dict[Call, None] = {}
        self._is_closed = False

    async def _call(self, serve: Callable[[SimActor], Any], timeout_s: float) -> Any:
        if self._learner.dead:
            raise Unreachable("the dead do not speak")
        if self._is_closed:
            raise Unreachable("the client is closed")
        call = Call(self._actor.link, serve, timeout_s)
        self._calls[call] = None
        try:
            return await call.result()
        finally:
            del self._calls[call]

    async def generate(
        self, request: RolloutRequest, *, timeout_s: float, on_progress: Callable[[], None] = lambda: None
    ) -> SampledGroup:
        sampled: SampledGroup = await self._call(lambda actor: actor.generate(request), timeout_s)
        return sampled

    async def status(self, *, timeout_s: float = 5.0) -> ActorStatus:
        status: ActorStatus = await self._call(SimActor.status, timeout_s)
        return status

    async def open_epoch(self, spec: EpochSpec) -> None:
        await self._call(lambda actor: actor.policy.open_epoch(spec), spec.timeout_s + 2)

    async def stage(self, run_id: str, epoch: int, manifest: Manifest, *, timeout_s: float) -> tuple[int, ...]:
        answer: tuple[tuple[int, ...], float] = await self._call(
            lambda actor: actor.policy.stage(run_id, epoch, manifest, timeout_s), timeout_s + 2
        )
        return answer[0]

    async def commit(self, run_id: str, epoch: int, policy_version: int, *, timeout_s: float) -> float:
        pause_s: float = await self._call(
            lambda actor: actor.policy.commit(run_id, epoch, policy_version, timeout_s), timeout_s + 2
        )
        return pause_s

    async def abort(self, run_id: str, epoch: int, *, timeout_s: float = 5.0) -> None:
        await self._call(lambda actor: actor.policy.abort(run_id, epoch), timeout_s)

    async def server_info(self, *, timeout_s: float = 5.0) -> ServerInfo:
        raise NotImplementedError

    def holds(self, media: Sequence[bytes]) -> bool:
        return False

    def forget_media(self) -> None:
        pass

    async def close(self) -> None:
        self._is_closed = True
        for call in self._calls:
            call.fail(Unreachable("the client is closed"))
