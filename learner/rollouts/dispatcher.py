"""The dispatcher: turns credits into finished groups.

    ledger -> row -> processor --+--> sampler (an actor) --> tripwire --> reward --> buffer
      ^        (thread pool)     |                                          |          |
      |                          +-------- dropped, counted <---------------+          |
      +------------------------- too stale: sampled again <----------------------------+

| loop | waits for | unblocked by |
|---|---|---|
| `run` | a credit (`learner.rollouts.credits`) | a step (`set_version`), a dropped or stale group |
| one task per group | a thread, an actor's slot, the completions, the reward | the processor, the fleet, the actor |

What makes the run wrong ends it: an image mismatch, a broken dataset row, too many drops in a row. `run` raises the
error, and so does the trainer's next `buffer.take`.
"""

import asyncio
import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from common import tracing
from common.log import get_logger
from common.types import SamplingParams
from learner.data.ledger import Ledger
from learner.rewards.base import RewardError, Rewards
from learner.rollouts.buffer import GroupBuffer
from learner.rollouts.credits import Credits
from learner.rollouts.sampler import GroupFailed, Sampler, build_request
from learner.stopping import RunFailed
from learner.types import Dataset, Group, ProcessedPrompt, Processor, PromptSample

log = get_logger("learner.rollouts.dispatcher")

_MAX_UNIFORM_BATCHES = 8

STALE = "STALE"
"""The reason of groups that came too late, in `DispatchStats.dropped`: they are sampled again."""
TOO_LONG = "PROMPT_TOO_LONG"
"""The reason of groups whose prompt has more than `max_prompt_tokens`: no actor is asked."""
SKIPPED = "STEP_SKIPPED"
"""The reason of groups whose update was skipped."""


def describe_drop(reason: str, what: str) -> str:
    """One line for the user about the first group that is dropped for a reason."""
    return (
        f"group dropped, {reason}: {' '.join(what.split())}; more of them are only counted (groups_dropped in "
        'metrics.jsonl). docs/metrics.md says under "Dropped groups" what to do'
    )


class TooManyDrops(RunFailed):
    """So many groups failed one after the other that the cause is not the prompts."""


@dataclasses.dataclass(frozen=True, slots=True)
class DispatchStats:
    """Counts since the start of this process."""

    running: int
    dropped: dict[str, int]
    """Reason -> groups."""
    retries: dict[str, int]
    """Reason -> groups sent again, evaluation included."""


class Dispatcher:
    """Keeps as many groups going as the credits allow. `run` belongs to the fleet's event loop.

    Args:
        dataset: rows by number.
        ledger: which row is next.
        processor: turns a sample into what the learner trains with.
        sampler: asks the actors.
        rewards: scores the completions.
        buffer: receives finished groups; `run` sets its `on_stale`.
        credits: how far to run ahead; `credits.step` is the first policy version.
        sampling: of every group.
        run_id: part of group ids.
        sampling_seed: makes sampling reproducible, as far as the engine is; None leaves it to the actors.
        max_prompt_tokens: of an expanded prompt; a longer one is a dropped group. None: no bound.
        num_threads: for reading and processing rows.
        max_consecutive_drops: groups dropped with none finished between them that end the run.
        drop_uniform_groups: sample another group in place of one whose rewards are all equal.
        notify: told in one line, on the loop, when a group is dropped for a reason for the first time.
    """

    def __init__(
        self,
        *,
        dataset: Dataset,
        ledger: Ledger,
        processor: Processor,
        sampler: Sampler,
        rewards: Rewards,
        buffer: GroupBuffer,
        credits: Credits,  # noqa: A002 - site's builtin is no one's
        sampling: SamplingParams,
        run_id: str,
        sampling_seed: int | None = None,
        max_prompt_tokens: int | None = None,
        num_threads: int = 2,
        max_consecutive_drops: int = 64,
        drop_uniform_groups: bool = False,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._dataset = dataset
        self._ledger = ledger
        self._processor = processor
        self._sampler = sampler
        self._rewards = rewards
        self._buffer = buffer
        self._credits = credits
        self._sampling = sampling
        self._run_id = run_id
        self._sampling_seed = sampling_seed
        self._max_prompt_tokens = max_prompt_tokens
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="process")
        self._max_consecutive_drops = max_consecutive_drops
        self._consecutive_drops = 0
        self._drop_uniform_groups = drop_uniform_groups
        self._uniform_groups = 0  # in a row
        self._notify = notify
        self._dropped: collections.Counter[str] = collections.Counter()
        self._taken_back: set[int] = set()  # sequence numbers of stale groups that are not handed out again yet
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_lock = threading.Lock()

    async def run(self) -> None:
        """Dispatch until cancelled. Raises what ended the run, which the buffer then raises too."""
        with self._loop_lock:
            self._loop = asyncio.get_running_loop()
        self._buffer.on_stale = self._on_stale
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    while self._credits.available:
                        trained_at = self._credits.start()
                        tasks.create_task(self._run_group(self._ledger.next_sequence(), trained_at))
                    self._changed.clear()
                    await self._changed.wait()
        except BaseExceptionGroup as errors:
            # The first one; the others are its consequence or say the same of another group.
            cause = errors.exceptions[0]
            self._buffer.fail(cause)
            with contextlib.suppress(OSError):  # this error may be that the log's disk is full
                log.error("the rollouts failed", error=str(cause), kind=type(cause).__name__)
            raise cause from None
        finally:
            self._buffer.close()
            self._threads.shutdown(wait=False, cancel_futures=True)

    def set_version(self, version: int) -> None:
        """The trainer has taken the steps up to `version`. Call it before publishing them; from any thread."""
        self._on_loop(self._set_version, version)

    def stats(self) -> DispatchStats:
        """Counts, from any thread."""
        return DispatchStats(
            self._credits.running,
            dict(self._dropped),
            dict(self._sampler.retries),
        )

    # ---------------------------------------------------------------------------------------------------- a group

    async def _run_group(self, sequence: int, trained_at: int) -> None:
        try:
            with tracing.span("learner.group", sequence=sequence):
                group = await self._make_group(sequence, trained_at)
        except (GroupFailed, RewardError) as error:
            self._drop(sequence, error)
            return
        self._consecutive_drops = 0
        if self._is_refused(group):
            self._count_drop(sequence, "NO_SIGNAL", f"row {group.sample.row}: its rewards are all equal")
        else:
            self._credits.accept()
            self._buffer.put(group)

    async def _make_group(self, sequence: int, trained_at: int) -> Group:
        with tracing.span("learner.prepare"):
            sample, processed = await asyncio.get_running_loop().run_in_executor(self._threads, self._prepare, sequence)
        limit, length = self._max_prompt_tokens, len(processed.input_ids)
        if limit is not None and length > limit:
            what = f"its prompt has {length} tokens, more than data.max_prompt_tokens ({limit})"
            raise GroupFailed(TOO_LONG, f"row {sample.row}: {what}")
        max_staleness = self._credits.max_staleness
        with tracing.span("learner.rollout"):
            try:
                sampled = await self._sampler.sample(
                    build_request(self._group_id(sequence), sample, self._sampling_of(sequence)),
                    # The step that will train it may have moved on while it waited.
                    min_version=lambda: max(0, max(trained_at, self._credits.step) - max_staleness),
                    expected=processed,
                )
            except GroupFailed as error:
                raise GroupFailed(error.reason, f"row {sample.row}: {error}") from error
        with tracing.span("learner.rewards"):
            scores = await self._rewards.score(sample, sampled.completions)
        return Group(
            sampled.prompt.group_id,
            sequence,
            sample,
            processed,
            sampled.prompt,
            sampled.completions,
            scores.rewards,
            scores.parts,
        )

    def _prepare(self, sequence: int) -> tuple[PromptSample, ProcessedPrompt]:
        sample = self._dataset[self._ledger.row(sequence)]
        return sample, self._processor.process(sample)

    def _group_id(self, sequence: int) -> str:
        """Another one each time that it is handed out, so that no two trajectories of a run share a name."""
        if sequence not in self._taken_back:
            return f"{self._run_id}.{sequence}"
        self._taken_back.remove(sequence)
        return f"{self._run_id}.{sequence}.again{self._dropped[STALE]}"  # more each time that it is taken back

    def _sampling_of(self, sequence: int) -> SamplingParams:
        if self._sampling_seed is None:
            return self._sampling
        # Completion i samples from seed + i: no two completions of a run share one.
        return dataclasses.replace(
            self._sampling, seed=(self._sampling_seed << 32) + sequence * max(1, self._sampling.n)
        )

    def _drop(self, sequence: int, error: GroupFailed | RewardError) -> None:
        log.warning("group dropped", sequence=sequence, reason=error.reason, error=str(error))
        self._count_drop(sequence, error.reason, str(error))
        self._consecutive_drops += 1
        if self._consecutive_drops >= self._max_consecutive_drops:
            raise TooManyDrops(f"{self._consecutive_drops} groups in a row were dropped; the last: {error}") from error

    def _count_drop(self, sequence: int, reason: str, what: str) -> None:
        if reason not in self._dropped:
            self._notify(describe_drop(reason, what))
        self._ledger.mark_dropped(sequence, reason)
        self._dropped[reason] += 1
        self._credits.drop()
        self._changed.set()

    def _is_refused(self, group: Group) -> bool:
        """Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): whether equal rewards make the group worthless.

        After `_MAX_UNIFORM_BATCHES` batches of them without another kind they are taken all the same: the task is
        solved, or hopeless, and the run must not sample for ever.
        """
        if not self._drop_uniform_groups or group.rewards.min() != group.rewards.max():
            self._uniform_groups = 0
            return False
        self._uniform_groups += 1
        return self._uniform_groups <= _MAX_UNIFORM_BATCHES * self._credits.batch

    # ----------------------------------------------------------------------------------------------- other threads

    def _on_loop(self, function: Callable[..., None], *args: object) -> None:
        with self._loop_lock:
            if self._loop is None:  # not running yet: nobody else looks
                function(*args)
                return
        self._loop.call_soon_threadsafe(self._guarded, function, *args)

    def _guarded(self, function: Callable[..., None], *args: object) -> None:
        try:
            function(*args)
        except Exception as error:  # the loop would only log it, and the trainer wait for ever
            self._buffer.fail(error)
            raise

    def _set_version(self, version: int) -> None:
        self._credits.step = version
        self._changed.set()

    def _on_stale(self, groups: list[Group]) -> None:
        self._on_loop(self._take_back, groups)

    def _take_back(self, groups: list[Group]) -> None:
        for group in groups:
            self._credits.take_back()
            self._ledger.give_back(group.sequence)
            self._taken_back.add(group.sequence)
        self._dropped[STALE] += len(groups)
        log.info("groups too stale to train are sampled again", num_groups=len(groups))
        self._changed.set()
