"""Rank 0's other half: the event loop that talks to the actors while the main thread trains.

    main thread (trainer), feed               loop thread (this module)
    take_batch  <------- GroupBuffer -------- dispatcher ---> sampler ---> fleet ---> actors
    finish_step -------- new version -------> dispatcher
                -------- snapshot ----------> publisher -----------------> weight epochs
    evaluate    -------- requests ----------> sampler

A failure of any loop fails the trainer's next call.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from common.client import GrpcClient
from common.collective import address_towards
from common.config import ConfigError
from common.log import get_logger
from common.metrics import serve_metrics
from common.process.threads import to_own_thread
from common.rpc.server import is_loopback, split_address
from common.types import SamplingParams
from learner.batch.processing import PromptProcessor
from learner.config import LearnerConfig
from learner.data.dataset import PromptDataset
from learner.data.ledger import Ledger
from learner.evaluate import Evaluation, evaluate
from learner.launcher.actors import logs as actor_logs
from learner.reporting.metrics import LearnerMetrics
from learner.rewards.runner import RewardRunner
from learner.rollouts.buffer import BufferClosed, GroupBuffer
from learner.rollouts.credits import Credits
from learner.rollouts.dispatcher import SKIPPED, Dispatcher, DispatchStats, describe_drop
from learner.rollouts.fleet import Fleet
from learner.rollouts.limits import check_actors_limits
from learner.rollouts.members import FleetEvent, Member
from learner.rollouts.sampler import Sampler
from learner.types import Group
from learner.weights.publisher import Publisher
from learner.weights.snapshot import Snapshot

log = get_logger(__name__)

# How long the loop may take to end, and how often a caller looks whether it still runs.
_CLOSE_S = 10.0
_LOOK_S = 0.5
# How often it is said who is waited for at the start.
_WAITING_S = 20.0

T = TypeVar("T")


class Control:
    """The learner's view of its actors, for the trainer's thread."""

    def __init__(
        self,
        config: LearnerConfig,
        *,
        backend: str | None,
        train: PromptDataset,
        held_out: PromptDataset | None,
        processor: PromptProcessor,
        ledger: Ledger,
        version: int,
        notify: Callable[[str], None],
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`notify` is told what the user should know, one line each time: of actors, updates and dropped groups.

        What becomes of actors is no news while the run `is_stopping`: they may end together with it.
        """
        self.run_id = uuid.uuid4().hex[:12]
        self.processor = processor
        self._config = config
        self._backend = backend
        self._held_out = held_out
        self._ledger = ledger
        self._notify = notify
        self._is_stopping = is_stopping
        trainer = config.trainer
        self._buffer = GroupBuffer(
            max_groups=(trainer.max_staleness + 1) * trainer.batch_prompts, max_stale_share=trainer.max_stale_share
        )
        self._fleet = Fleet(
            config.rollout.actors,
            run_id=self.run_id,
            connect=functools.partial(
                GrpcClient, tls=config.rollout.tls, max_message_bytes=config.rollout.max_message_bytes
            ),
            slots_per_actor=config.rollout.slots_per_actor,
            hung_s=config.rollout.hung_s or config.rollout.group_timeout_s / 3,
        )
        self._sampler = Sampler(
            self._fleet,
            group_timeout_s=config.rollout.group_timeout_s,
            restart_on_update=config.rollout.on_update == "restart",
        )
        self._rewards = RewardRunner(
            config.reward.functions,
            config.reward.weights,
            decode=processor.decode,
            timeout_s=config.reward.timeout_s,
            num_processes=config.reward.num_processes,
        )
        self._dispatcher = Dispatcher(
            dataset=train,
            ledger=ledger,
            processor=processor,
            sampler=self._sampler,
            rewards=self._rewards,
            buffer=self._buffer,
            credits=Credits(trainer.batch_prompts, trainer.max_staleness, step=version, total_steps=trainer.num_steps),
            sampling=sampling_params(config),
            run_id=self.run_id,
            sampling_seed=config.rollout.seed,
            max_prompt_tokens=config.data.max_prompt_tokens,
            drop_uniform_groups=config.rollout.drop_uniform_groups,
            notify=notify,
        )
        self._metrics = LearnerMetrics(
            members=self._fleet.members,
            stats=self.stats,
            num_buffered=self._buffer.__len__,
            version=version,
        )
        self._skipped: dict[str, int] = {}  # as `DispatchStats.dropped`
        self._stop_metrics: Callable[[], None] = lambda: None
        self._publisher: Publisher | None = None
        self._loop = uvloop.new_event_loop()
        self._main: asyncio.Task[None] | None = None
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    # ---------------------------------------------------------------------------------------- the trainer's thread

    def start(self) -> None:
        """Find the actors; returns when enough of them answer. Raises ConfigError if they do not."""
        if self._config.metrics_listen is not None:
            port, self._stop_metrics = serve_metrics(self._metrics.registry, self._config.metrics_listen)
            log.info("metrics", port=port)
        self._thread.start()
        started = time.monotonic()
        logs = actor_logs(self._config.run_dir) if self._config.run_dir is not None else {}
        while not concurrent.futures.wait([self._ready], _WAITING_S).done:
            members = self._fleet.members()
            missing = {member.address: member.reason for member in members if not member.reachable}
            if missing or not members:
                self._notify(still_waiting(missing, time.monotonic() - started, logs))
        self._ready.result()

    def publish(self, snapshot: Snapshot) -> None:
        """Hand over a new version, which may still be filled; returns at once."""
        assert self._publisher is not None
        self._publisher.submit(snapshot)

    def take_batch(self, version: int, accept: Callable[[Sequence[Group]], bool]) -> list[Group]:
        """Wait for the groups of one step, see `GroupBuffer.take`. Raises what broke the rollouts."""
        trainer = self._config.trainer
        try:
            groups = self._buffer.take(
                trainer.batch_prompts, version=version, max_staleness=trainer.max_staleness, accept=accept
            )
        except BufferClosed:
            self._raise_failure()
            raise
        self._metrics.waiting.end(version)
        return groups

    def wait_for(self, version: int) -> None:
        """The trainer has nothing to do until `take_batch` of this version returns, which asks `accept` again."""
        self._metrics.waiting.begin(version)
        self._buffer.look_again()

    def finish_step(self, groups: Sequence[Group], version: int, *, skipped: Sequence[Group]) -> None:
        """These groups gave `version`: no resumed run trains them again, and generation may go on.

        Args:
            groups: of the batch.
            version: that the step led to.
            skipped: those whose gradient was not finite. Nothing was learned from them; they are counted as dropped.
        """
        self._metrics.trained(groups, version)
        dropped = {group.sequence for group in skipped}
        for sequence in dropped:
            self._ledger.mark_dropped(sequence, SKIPPED)
        if dropped:
            if not self._skipped:
                self._notify(describe_drop(SKIPPED, f"loss or gradient of step {version} was not finite"))
            self._skipped = {SKIPPED: self._skipped.get(SKIPPED, 0) + len(dropped)}
        self._ledger.mark_trained([group.sequence for group in groups if group.sequence not in dropped])
        self._dispatcher.set_version(version)

    def evaluate(self, version: int, is_stopping: Callable[[], bool]) -> Evaluation | None:
        """Accuracy of `version` on the held-out rows; None without any, or if it `is_stopping` before they are done."""
        if self._held_out is None:
            return None
        settings = self._config.evaluation
        training = sampling_params(self._config)
        sampled = dataclasses.replace(training, n=settings.samples, temperature=settings.temperature)
        return self._call(
            evaluate(
                self._held_out,
                sampler=self._sampler,
                rewards=self._rewards,
                processor=self.processor,
                greedy=dataclasses.replace(training, n=1, temperature=0.0),
                sampled=sampled if settings.samples else None,
                settings=settings,
                group_prefix=f"{self.run_id}.held-out.{version}",
                version=version,
            ),
            is_stopping,
        )

    def measured(self, values: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`, for Prometheus."""
        self._metrics.measured(values)

    def members(self) -> tuple[Member, ...]:
        """The actors, for the display."""
        return self._fleet.members()

    def stats(self) -> DispatchStats:
        """Counts since this process started."""
        stats = self._dispatcher.stats()
        return dataclasses.replace(stats, dropped=stats.dropped | self._skipped)

    def close(self) -> None:
        """Stop everything; the actors are left as they are."""
        self._stop_metrics()
        if self._main is not None:
            self._loop.call_soon_threadsafe(self._main.cancel)
        if self._thread.ident is None:  # `start` has failed before
            self._rewards.close()
        else:
            self._thread.join(timeout=_CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, T], is_stopping: Callable[[], bool]) -> T | None:
        """Run a coroutine on the loop; None if it `is_stopping` before. Raises what it raises or ended the loop."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        while not future.done():
            concurrent.futures.wait([future], timeout=_LOOK_S)
            if is_stopping():  # what fails now has failed because of it
                future.cancel()
                return None
            if not self._thread.is_alive() and not future.done():
                self._raise_failure()
                raise RuntimeError("the control loop has ended")
        try:
            return future.result()
        except concurrent.futures.CancelledError:  # the loop ended, and its slots with it
            self._raise_failure()
            raise

    def _raise_failure(self) -> None:
        """Raise what ended the loop, once it has ended."""
        self._thread.join(timeout=_CLOSE_S)
        if self._failure is not None:
            raise self._failure

    # ------------------------------------------------------------------------------------------------ the loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(self._serve())
        try:
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._failure = error
            self._buffer.fail(error)
            if not self._ready.done():
                self._ready.set_exception(error)
            with contextlib.suppress(OSError):  # this error may be that the log's disk is full
                log.error("the control loop failed", exc_info=error)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    async def _serve(self) -> None:
        self._fleet.subscribe(self._tell_event)
        self._fleet.subscribe(self._metrics.fleet_event)
        try:
            await self._fleet.start(
                startup_timeout_s=self._config.rollout.startup_timeout_s, min_actors=self._config.rollout.min_actors
            )
            await check_actors_limits(self._config, self._fleet.members())
            self._publisher = Publisher(
                self._fleet,
                run_id=self.run_id,
                host=self._config.weights.host or await self._own_address(),
                backend=self._backend,
                timeout_s=self._config.weights.timeout_s,
                merge_adapter=self._config.weights.merge_adapter,
                delta=self._config.weights.delta,
                notify=self._update_failed,
                notify_merged=self._notify,
                on_update=self._metrics.updated,
            )
            self._ready.set_result(None)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._fleet.watch())
                tasks.create_task(self._publisher.run())
                tasks.create_task(self._dispatcher.run())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            await to_own_thread("close-rewards", self._rewards.close)
            await self._fleet.close()

    async def _own_address(self) -> str:
        """Towards the actors that answer, and those that may come later."""
        members = sorted(self._fleet.members(), key=lambda member: not member.reachable)
        return await to_own_thread("own-address", own_address, [member.address for member in members])

    def _tell_event(self, event: FleetEvent) -> None:
        if not self._is_stopping():
            self._notify(describe(event))

    def _update_failed(self, line: str) -> None:
        self._metrics.update_failed()
        self._notify(line)


def sampling_params(config: LearnerConfig) -> SamplingParams:
    """How training samples."""
    rollout = config.rollout
    return SamplingParams(
        n=rollout.n,
        temperature=rollout.temperature,
        max_tokens=rollout.max_tokens,
        stop=rollout.stop,
        allowed_token_ids=rollout.allowed_token_ids,
    )


def describe(event: FleetEvent) -> str:
    """One line for the user about an actor."""
    if event.kind == "unreachable":  # it may still be loading, for minutes
        return f"waiting for actor {event.address} ({event.reason}) ..."
    what = event.state.value if event.kind == "state" and event.state is not None else event.kind
    return f"actor {event.address} {what}" + (f": {event.reason}" if event.reason else "")


def still_waiting(missing: Mapping[str, str], waited_s: float, logs: Mapping[str, Path]) -> str:
    """One line about actors that do not answer, `missing`: address to reason. `logs`: of those that have one here."""
    if not missing:
        return f"waiting for actors, {waited_s:.0f} s: no address is known yet"
    loading = [f"still loading ({logs[address]})" for address in missing if address in logs]
    others = [f"{address} ({reason})" for address, reason in missing.items()]
    actors = f"{len(missing)} actor{'s' if len(missing) > 1 else ''}"
    return f"waiting for {actors}, {waited_s:.0f} s: {(loading or others)[0]}"


def own_address(actors: Sequence[str]) -> str:
    """This machine's address on the route to the first of them that is not on loopback: those that are reach it too.

    Raises ConfigError if none of them has an address itself.
    """
    loopback = None
    for actor in actors:
        with contextlib.suppress(OSError):  # a name without an address, or an address without a route, as yet
            address = address_towards(*split_address(actor))
            if not is_loopback(address):
                return address
            loopback = loopback or address
    if loopback is None:
        raise ConfigError(f"there is no address of this machine on a route to {', '.join(actors)}; give weights.host")
    return loopback
