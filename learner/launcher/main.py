"""`outrider`: actors and learner together on one machine, for those who do not want to know torchrun.

    outrider --config examples/digits/config.yaml

It starts `local.num_actors` actors and a torchrun learner, each in a session of its own with its log in the run folder.
An actor that dies is started again. When the learner ends, so do the actors; when the learner is *killed*, the actors
stay for some minutes, and the same command finds them and resumes at the last checkpoint. Ctrl-C stops everything, the
learner after its step and with a checkpoint; a second one does so at once.
"""

import argparse
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from common.process.lifecycle import end_with_parent
from learner.stopping import STEP_END_S

if TYPE_CHECKING:
    from learner.config import LearnerConfig
    from learner.launcher.gpus import GpuShares

EPILOG = """\
examples:
  outrider --config examples/digits/config.yaml model.path=runs/my-model trainer.total_steps=50
  outrider --config run.yaml local.num_actors=1 local.num_ranks=2
  outrider --check --config run.yaml

Every key of the configuration can be given as key.path=value; learner/config/ lists them.
"""

_POLL_S = 0.2
# From Ctrl-C: what is still there after this is killed, but for a learner that ends its step.
_STOP_S = 3.0
# The exit code of a process that a signal has ended is more, as a shell says it.
_SIGNALLED = 128
# A disk that takes nothing any more.
_FULL_BYTES = 2**16
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}


def main(arguments: Sequence[str] | None = None, prepare: "Callable[[LearnerConfig, Path], Path] | None" = None) -> int:
    """Entry point. `prepare(config, run_dir)` may make the checkpoint that the run starts from; it returns the path."""
    options = parse(arguments)

    from common.config import ConfigError, load_config
    from common.process.outliving import outliving_output
    from learner.config import LearnerConfig

    try:
        overrides = [*options.overrides, *([f"seed={options.seed}"] if options.seed is not None else [])]
        config = load_config(LearnerConfig, options.config, overrides)
        if options.check:
            from learner.launcher.check import check

            return check(config, str(options.config), has_model=prepare is None)
        with outliving_output():
            return _run(config, prepare)
    except ConfigError as error:
        return _say(2, str(error))
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return _say(1, f"{error.filename or 'a file of the run'}: {error.strerror}")
    except KeyboardInterrupt:
        print("\noutrider: stopped; the same command resumes at the last checkpoint", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="outrider",
        description="Run actors and learner together on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", required=True, help="YAML file of the run")
    parser.add_argument("--check", action="store_true", help="tell every mistake that is found, and start nothing")
    parser.add_argument("--seed", type=int, help="seed of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the configuration")
    return parser.parse_intermixed_args(arguments)


def _run(config: "LearnerConfig", prepare: "Callable[[LearnerConfig, Path], Path] | None") -> int:
    from learner.launcher.check import mistakes, try_task, with_local_actors
    from learner.launcher.gpus import share_gpus
    from learner.storage import run_folder

    signal.signal(signal.SIGTERM, _interrupt)
    # A mistake leaves neither a run folder nor an actor behind.
    listed = with_local_actors(config)
    if (mistake := next(mistakes(listed, has_model=prepare is None), None)) is not None:
        return _say(*mistake)
    gpus = share_gpus(listed)
    if (mistake := try_task(listed, gpus.learner)) is not None:
        return _say(*mistake)
    with run_folder.held(config, "launcher") as run_dir:
        if prepare is not None:
            model = listed.model.model_copy(update={"path": prepare(config, run_dir)})
            listed = listed.model_copy(update={"model": model})
        return _run_in(run_dir, listed.model_copy(update={"run_dir": run_dir}), gpus)


def _run_in(run_dir: Path, config: "LearnerConfig", gpus: "GpuShares") -> int:
    from learner import last_words
    from learner.launcher.actors import LocalActors
    from learner.launcher.interrupts import put_off

    actors = LocalActors(config.local, config.model.path, run_dir, lora_rank=_lora_rank(config), gpus=gpus.actors)
    learner: subprocess.Popen[bytes] | None = None
    was_killed = is_asked = False
    try:
        actors.start()
        with put_off():
            learner = _start_learner(config, run_dir, gpus.learner)
        words = None
        while learner.poll() is None and words is None:
            actors.restart_dead()
            time.sleep(_POLL_S)
            words = last_words.read(run_dir, learner.pid)
        code = learner.poll()
        if code == 0 and (run_dir / "summary.json").exists():
            return 0
        if code is not None:
            words = last_words.read(run_dir, learner.pid)
        was_killed = words is None and code is not None and (code < 0 or code > _SIGNALLED)
        if was_killed:
            waiting = f". The actors wait for it: {actors}" if config.local.num_actors else ""
            words = 1, f"the learner was killed; the same command resumes it{waiting}"
        return _say(*(words or (1, _wordless(run_dir))))
    except KeyboardInterrupt:
        is_asked = True
        raise
    finally:
        _on_signals(signal.SIG_IGN)
        deadline = time.monotonic() + _STOP_S
        if learner is not None:
            _signal_group(learner.pid, signal.SIGTERM)
        if not was_killed:
            actors.terminate()
        if learner is not None:
            if is_asked:
                _wait_for_step(learner)
                if (words := last_words.read(run_dir, learner.pid)) is not None:
                    _say(*words)
            _end_learner(learner, deadline)
        if not was_killed:
            actors.end(deadline)


def _say(code: int, line: str) -> int:
    """The last words of this command; its exit code."""
    print(f"outrider: {line}", file=sys.stderr)
    return code


def _wordless(run_dir: Path) -> str:
    why = "the disk is full" if shutil.disk_usage(run_dir).free < _FULL_BYTES else "it could not say why"
    return f"the learner ended before its run: {why}; see {run_dir}/logs"


def _lora_rank(config: "LearnerConfig") -> int:
    """Rank of the adapter that the learner will send; 0 if it sends none, or sends it merged."""
    adapter = config.model.adapter
    if adapter is None or config.weights.merge_adapter:
        return 0
    if adapter.reaches_vision and not config.model.freeze_vision_tower:
        return 0  # actors apply no adapter there
    return adapter.rank  # of one from a directory nothing is known here: `local.actor` can say it


def _start_learner(config: "LearnerConfig", run_dir: Path, gpus: "tuple[str, ...] | None") -> subprocess.Popen[bytes]:
    """torchrun with the resolved configuration. Its own chatter goes to a log; rank 0 has our standard output."""
    import yaml

    from learner import last_words
    from learner.launcher.environment import learner_environment
    from learner.storage.run_folder import write_whole

    last_words.clear(run_dir)  # one may have ended only now
    path = run_dir / "learner.yaml"
    write_whole(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    command = [sys.executable, "-m", "learner.torchrun", "--standalone"]
    command += ["--nproc-per-node", str(config.local.num_ranks), "-m", "learner", "--config", str(path)]
    with (run_dir / "logs" / "torchrun.log").open("ab") as log:
        return subprocess.Popen(
            command,
            env=learner_environment(config, gpus),
            stdin=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - it calls the kernel and nothing else
        )


def _wait_for_step(learner: subprocess.Popen[bytes]) -> None:
    """Until it has ended with a checkpoint of its step; not if that takes too long, or another signal insists."""
    _on_signals(_interrupt)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        try:
            learner.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            _say(0, "the learner ends its step and writes a checkpoint; Ctrl-C again does without")
            learner.wait(STEP_END_S)
    _on_signals(signal.SIG_IGN)


def _on_signals(handler: "Callable[[int, FrameType | None], None] | signal.Handlers") -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _end_learner(learner: subprocess.Popen[bytes], deadline: float) -> None:
    try:
        learner.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        # A rank that is stopped takes no other signal, and torchrun would wait for it for half a minute.
        for rank in _children(learner.pid):
            _signal_group(rank, signal.SIGKILL)
        _signal_group(learner.pid, signal.SIGKILL)
        learner.wait()
    _signal_group(learner.pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """Its child processes; torchrun gives each rank a session of its own."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
