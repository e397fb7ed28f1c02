"""The training loop, on every rank.

    next batch -> scatter -> train_step -> publish -> snapshot -> (checkpoint) -> (evaluate)
     rank 0        all        all           rank 0     all         all             rank 0

| waits for | unblocked by |
|---|---|
| the next batch (`learner.training.feed`) | enough finished groups, fresh enough; packed while the step before ran |
| collectives of a step | the other ranks |
| `evaluate` | the held-out completions |

All but the collectives also end when the run is asked to stop (`learner.stopping`). Before each step the ranks agree
whether one of them was, and then end together, with a checkpoint of the step before.

It never waits for the wire of a weight update: `publish` hands over the copy that the ranks then fill, and returns.
With `max_staleness = 0` the next batch cannot start before its actors have the new version, so the same loop is then
synchronous.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.log import get_logger
from learner.config import LearnerConfig
from learner.control import Control
from learner.data.ledger import Ledger
from learner.reporting.report import Reporter
from learner.stopping import AgreedStop, RunFailed, StopRequest
from learner.training.distributed import Ranks
from learner.training.feed import BatchFeed
from learner.training.policy import Policy
from learner.training.step import StepStats, merge_stats
from learner.weights.snapshot import Snapshot

log = get_logger(__name__)

# Steps in a row without an update, for a loss or gradient that is not finite, that end the run, and updates in a row
# where a step has several.
_MAX_SKIPPED_STEPS = 3
_MAX_SKIPPED_UPDATES = 10
# Of fewer tokens the mean says little: one that was very unlikely can be far off in bfloat16. Several steps may add up.
_MIN_PARITY_TOKENS = 64


class ParityError(RunFailed):
    """Learner and actor disagree about the probability of what the current policy sampled."""


@dataclass(frozen=True, slots=True)
class RankZero:
    """What exists on rank 0 alone: the way to the actors, the ledger of the prompts, and who is told of each step."""

    control: Control
    ledger: Ledger
    reporter: Reporter


class Trainer:
    """Runs the loop on one rank."""

    def __init__(
        self,
        config: LearnerConfig,
        ranks: Ranks,
        policy: Policy,
        run_dir: Path,
        zero: RankZero | None,
        stop: StopRequest | None = None,
    ) -> None:
        """`zero` is None on the other ranks. Without `stop` nobody can ask it to."""
        self._config = config
        self._ranks = ranks
        self._policy = policy
        self._run_dir = run_dir
        self._zero = zero
        self._stop = stop or StopRequest()
        self._saved_version = policy.version
        self._feed: BatchFeed | None = None
        if zero is not None:
            self._feed = BatchFeed(
                config,
                zero.control,
                zero.ledger,
                num_ranks=ranks.num_ranks,
                placeholder_ids=policy.placeholder_ids,
                cost=policy.cost,
                is_stopping=self._is_asked_to_stop,
            )
        self._parity_sum, self._parity_tokens = 0.0, 0  # since the last comparison with the limit
        self._num_skipped_steps = 0
        self._num_skipped_updates = 0

    def run(self) -> Path:
        """Train to the last step; the directory of the final export.

        Raises KeyboardInterrupt, with what was trained in a checkpoint, if the run was asked to stop before.
        """
        try:
            with self._stop.heeded():
                self._train_until_stopped()
            export = self._policy.export(self._run_dir / "export")
        except BaseException:
            with contextlib.suppress(Exception):  # this error is the one to tell
                self._policy.finish()  # the end of the process would not wait for a checkpoint that is being written
            raise
        self._policy.finish()
        return export

    def _train_until_stopped(self) -> None:
        try:
            self._train()
        except AgreedStop:
            self._leave()
            raise
        except RuntimeError as error:
            if not self._stop.is_made or self._ranks.num_ranks == 1 or isinstance(error, RunFailed):
                raise
            # Another rank was not in the loop yet, or has failed: it has ended, and no collective can.
            log.warning("asked to stop, and the step could not end", error=str(error))
            raise KeyboardInterrupt from None

    def _train(self) -> None:
        settings = self._config.trainer
        self._policy.snapshot(self._publish)
        if self._is_evaluation_due():
            self._evaluate()
        if self._zero is not None:
            self._zero.reporter.training_begins()
        while self._policy.version < settings.num_steps:
            self._step()
            is_last = self._policy.version == settings.num_steps
            try:
                if self._is_evaluation_due():
                    self._evaluate()
            finally:  # an evaluation that fails ends the run, and must not cost its steps
                if is_last or _is_due(self._policy.version, settings.checkpoint_every):
                    self._checkpoint()
        self._stop_if_asked()

    def _step(self) -> None:
        started_at = time.monotonic()
        batch = self._feed.next(self._policy.version) if self._feed is not None else None
        self._stop_if_asked()
        wait_s = max(0.0, batch.taken_at - started_at) if batch is not None else 0.0
        updates = self._policy.step(batch.parts if batch is not None else None)
        stats = merge_stats(updates)
        if self._zero is not None and batch is not None:
            skipped = [
                group
                for mini_batch, of_mini_batch in zip(batch.mini_batches, updates, strict=True)
                if all(update.skipped for update in of_mini_batch)
                for group in mini_batch
            ]
            self._zero.control.finish_step(batch.groups, self._policy.version, skipped=skipped)
        self._policy.snapshot(self._publish)
        if self._zero is not None and batch is not None:
            self._zero.reporter.step(
                self._policy.version,
                batch.groups,
                stats,
                self._zero.control.stats(),
                wait_s=wait_s,
                overlong_penalties=batch.overlong_penalties,
            )
        in_order = [update for of_epoch in zip(*updates, strict=True) for update in of_epoch]
        self._stop_if_apart(stats, in_order)
        self._stop_if_nothing_changes(in_order)

    def _publish(self, snapshot: Snapshot) -> None:
        assert self._zero is not None
        self._zero.control.publish(snapshot)

    def _stop_if_apart(self, stats: StepStats, updates: Sequence[StepStats]) -> None:
        """`stats` are those of all `updates` of a step."""
        step = self._policy.version - 1
        limit = self._config.trainer.max_parity_diff
        if limit is not None and not stats.parity_max_abs_diff <= limit:  # NaN is no parity either
            raise ParityError(
                f"step {step}: a logprob of learner and actor differs by {stats.parity_max_abs_diff:.2e}, more than "
                f"trainer.max_parity_diff ({limit:.0e}): what is trained is not what was sampled"
            )
        for update in updates:
            if not math.isnan(update.parity_mean_abs_diff):  # it is skipped then, and must not hide the others
                self._parity_sum += update.parity_mean_abs_diff * update.parity_tokens
                self._parity_tokens += update.parity_tokens
        if self._parity_tokens < _MIN_PARITY_TOKENS:
            return
        mean = self._parity_sum / self._parity_tokens
        self._parity_sum, self._parity_tokens = 0.0, 0
        limit = self._config.trainer.max_mean_parity_diff
        if limit is not None and mean > limit:
            raise ParityError(
                f"step {step}: logprobs of learner and actor differ by {mean:.2g} on average, more than "
                f"trainer.max_mean_parity_diff ({limit:g}): the two compute different models"
            )

    def _stop_if_nothing_changes(self, updates: Sequence[StepStats]) -> None:
        """`updates`: of a step, in their order."""
        in_a_row = self._num_skipped_updates
        for update in updates:
            in_a_row = in_a_row + 1 if update.skipped else 0
            if in_a_row == _MAX_SKIPPED_UPDATES:
                break
        self._num_skipped_updates = in_a_row
        self._num_skipped_steps = self._num_skipped_steps + 1 if all(update.skipped for update in updates) else 0
        if self._num_skipped_steps == _MAX_SKIPPED_STEPS or in_a_row == _MAX_SKIPPED_UPDATES:
            raise RunFailed(
                f"step {self._policy.version - 1}: loss or gradient of {in_a_row} optimizer updates in a row was not "
                "finite, and nothing is learned; lower optimizer.lr, or look at rewards and data"
            )

    def _is_evaluation_due(self) -> bool:
        settings = self._config.trainer
        version = self._policy.version
        return version in (0, settings.num_steps) or _is_due(version, settings.eval_every)

    def _evaluate(self) -> None:
        """Unless the run has done so at this version, before it was resumed."""
        if self._zero is None or self._zero.reporter.evaluated_version == self._policy.version:
            return
        reporter = self._zero.reporter
        reporter.phase("evaluating")
        result = self._zero.control.evaluate(self._policy.version, self._is_asked_to_stop)
        if result is not None:
            reporter.accuracy(self._policy.version, result)
        reporter.phase("training")

    def _checkpoint(self) -> None:
        state = {}
        if self._zero is not None:
            state = {"ledger": self._zero.ledger.to_dict(), "progress": self._zero.reporter.state()}
        self._policy.save(self._run_dir, state)
        self._saved_version = self._policy.version

    def _is_asked_to_stop(self) -> bool:
        return self._stop.is_made

    def _stop_if_asked(self) -> None:
        """Where all ranks are at the same version: they agree whether one of them was."""
        if self._ranks.any(self._stop.is_made):
            raise AgreedStop

    def _leave(self) -> None:
        """On all ranks, with a checkpoint of the last step."""
        version = self._policy.version
        if version > self._saved_version:
            self._checkpoint()
        self._policy.finish()
        if self._zero is not None:
            saved = f"the checkpoint of step {version} is written; started again, the run goes on from it"
            self._zero.reporter.note(f"stopping: {saved if version else 'no step has been trained'}")
        with contextlib.suppress(RuntimeError):  # one that could not write its part says so
            self._ranks.any(True)  # once one has ended, torchrun ends the others


def _is_due(version: int, every: int) -> bool:
    return every > 0 and version % every == 0
