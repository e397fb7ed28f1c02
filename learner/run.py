"""One rank from start to end: put the parts together, train, sum up, take apart in order."""

import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from common import log as logging
from common import tracing
from common.checkpoint import check_checkpoint
from common.process.lifecycle import end_with_parent
from learner import last_words
from learner.batch.processing import PromptProcessor
from learner.config import LearnerConfig
from learner.control import Control, sampling_params
from learner.data.dataset import PromptDataset
from learner.data.ledger import Ledger
from learner.preflight import check_actors, load_task
from learner.reporting.completions_log import CompletionsLog
from learner.reporting.display import make_display
from learner.reporting.held_out import held_out_of
from learner.reporting.json_lines import JsonLines
from learner.reporting.question import write_question
from learner.reporting.report import Progress, Reporter
from learner.reporting.summary import format_summary, write_summary
from learner.reporting.trackers import Trackers, check_trackers
from learner.stopping import StopRequest
from learner.storage import run_folder
from learner.storage.checkpoint import drop_partial
from learner.training.distributed import Ranks, join_ranks
from learner.training.policy import Policy
from learner.training.rank_watch import watching
from learner.training.trainer import RankZero, Trainer

log = logging.get_logger(__name__)

Rows = tuple[PromptDataset, PromptDataset | None]


def run(config: LearnerConfig) -> int:
    """Run this rank to the end; the exit code. Raises ConfigError for mistakes of the user."""
    check_checkpoint(config.model.path, "model.path")
    check_actors(config.rollout)
    check_trackers(config.trackers)
    stop = StopRequest()
    stop.install()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # torchrun does not take its ranks along when it is killed
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(
            join_ranks(config.trainer.device, config.trainer.fsdp_size, config.trainer.sequence_parallel_size)
        )
        on_silence = functools.partial(_end_job, config.run_dir)
        stack.enter_context(watching(ranks.num_ranks, ranks.rank, config.trainer.rank_timeout_s, on_silence))
        rows = load_task(config) if ranks.is_main else None
        own = stack.enter_context(run_folder.held(config, "learner")) if ranks.is_main else None
        if own is not None:
            drop_partial(own)
        run_dir = Path(ranks.broadcast(str(own).encode() if own else None).decode())
        stream = stack.enter_context((run_dir / "logs" / f"learner-{ranks.rank}.log").open("a", encoding="utf-8"))
        logging.configure("info", stream, rank=str(ranks.rank))
        config = _with_steps(config, ranks, rows)  # the configuration in the folder keeps the passes
        policy = Policy(config, ranks)
        state = policy.restore(run_dir)
        if rows is not None:
            return _run_rank_zero(config, ranks, policy, run_dir, state, rows, stop)
        Trainer(config, ranks, policy, run_dir, None, stop).run()
        return 0


def _run_rank_zero(
    config: LearnerConfig,
    ranks: Ranks,
    policy: Policy,
    run_dir: Path,
    state: dict[str, Any] | None,
    rows: Rows,
    stop: StopRequest,
) -> int:
    """The loop, and everything around it that talks."""
    train, held_out = rows
    processor = PromptProcessor(config.model.path, max_pixels=config.data.max_media_pixels)
    progress, ledger = _resume_state(config, train, state)
    with contextlib.ExitStack() as stack:
        metrics = JsonLines(run_dir / "metrics.jsonl")
        stack.callback(metrics.close)
        decode = functools.partial(processor.decode, keep_special=True)
        completions = CompletionsLog(run_dir / "completions.jsonl", config.trainer.log_completions, decode)
        stack.callback(completions.close)
        display = make_display(
            name=config.name,
            total_steps=config.trainer.num_steps,
            run_dir=run_dir,
            held_out=held_out_of(config.reward),
        )
        control = Control(
            config,
            backend=config.weights.backend or (None if ranks.device.type == "cuda" else "gloo"),
            train=train,
            held_out=held_out,
            processor=processor,
            ledger=ledger,
            version=policy.version,
            notify=display.note,
            is_stopping=lambda: stop.is_made,
        )
        stack.enter_context(display)
        trackers = Trackers(config, run_dir, policy.version, display.note)
        stack.callback(trackers.close)
        display.watch_actors(control.members)
        if state is not None:
            display.note(f"resuming {run_dir} at step {policy.version}")
        display.note(_describe(policy))
        display.phase("waiting for actors")
        if config.tracing:
            stack.callback(tracing.start("outrider-learner"))
        stack.callback(control.close)
        control.start()
        reporter = Reporter(display, metrics, progress, [control.measured, trackers.log], completions)
        export = Trainer(config, ranks, policy, run_dir, RankZero(control, ledger, reporter), stop).run()
        summary = reporter.summary(config.name, config.seed, policy.version, export)
    question = write_question(run_dir, (held_out or train)[0], sampling_params(config))
    write_summary(run_dir, summary)
    print(format_summary(summary, question, held_out_of(config.reward)), flush=True)
    return 0


def _with_steps(config: LearnerConfig, ranks: Ranks, rows: Rows | None) -> LearnerConfig:
    """With `trainer.total_steps` in the place of `trainer.total_passes`; rank 0 has the rows."""
    num_rows = int(ranks.broadcast(str(len(rows[0])).encode() if rows is not None else None).decode())
    if ranks.is_main and config.trainer.total_passes is not None:
        print(f"{config.name}: {config.trainer.describe_length(num_rows)}", flush=True)
    return config.model_copy(update={"trainer": config.trainer.over(num_rows)})


def _resume_state(config: LearnerConfig, train: PromptDataset, state: dict[str, Any] | None) -> tuple[Progress, Ledger]:
    if state is None:
        return Progress(), Ledger(config.seed, len(train))
    progress = Progress(**state["progress"])
    progress.resumed_from.append(state["version"])
    return progress, Ledger.from_dict(state["ledger"], seed=config.seed, num_rows=len(train))


def _describe(policy: Policy) -> str:
    report = policy.freeze_report
    parts = f" ({', '.join(report.frozen)})" if report.frozen else ""
    frozen = f", {report.num_frozen:,} frozen{parts}" if report.num_frozen else ""
    adapted = f" (LoRA in {report.num_adapted} layers)" if report.num_adapted else ""
    return f"{type(policy.model).__name__}: {report.num_trainable:,} parameters train{adapted}{frozen}"


def _end_job(run_dir: Path | None, line: str) -> NoReturn:
    """At once: the main thread waits in a collective, which nothing can interrupt. torchrun ends the other ranks."""
    if run_dir is not None:
        last_words.leave(run_dir, 1, line)
    with contextlib.suppress(OSError):  # as of a full disk
        print(f"learner: {line}", file=sys.stderr, flush=True)
        log.error("the job ends", reason=line)
    os._exit(1)
