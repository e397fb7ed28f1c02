"""The actors of the single-machine launcher: started, started again when they die, found again, stopped.

Each is `python -m actor` in a session of its own, so that its process group holds vLLM's processes too. `actors.json`
in the run folder remembers them for the next command, should this one be killed.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.config import ConfigError
from learner.config import LocalConfig
from learner.launcher.interrupts import put_off
from learner.storage.run_folder import write_whole

_HOST = "127.0.0.1"
# A learner that is killed has this long to come back before its actors give up.
_IDLE_EXIT_S = 600.0
# In a row: of one that has lived for so long, the count begins anew.
_MAX_RESTARTS = 20
_SETTLED_S = 300.0
# Of one that has never been ready: what is in its way will not go.
_MAX_FAILED_STARTS = 3
# How long a killed process may take to be gone.
_END_S = 10.0
_POLL_S = 0.05
_USER_ERROR = 2
_OWN_LINE = re.compile(r"^actor: (.*)$", re.MULTILINE)
_TRACEBACK_END = re.compile(r"^Traceback .*\n(?:(?: .*)?\n)*(\S.*)$", re.MULTILINE)


@dataclass(slots=True)
class _Actor:
    index: int
    address: str
    pid: int = 0
    process: subprocess.Popen[bytes] | None = None  # None: started by an earlier command
    num_restarts: int = 0
    num_failed_starts: int = 0
    started_at: float = 0.0
    log_offset: int = 0  # where in its log begins what it has said since its start


def addresses(config: LocalConfig) -> tuple[str, ...]:
    """Where the actors will listen."""
    return tuple(f"{_HOST}:{config.base_port + i}" for i in range(config.num_actors))


def logs(run_dir: Path) -> dict[str, Path]:
    """The log of each actor that a launcher has started for this run, by its address."""
    return {address: _log_path(run_dir, index) for index, address in enumerate(_read_known(run_dir))}


class LocalActors:
    """`config.num_actors` actors on ascending ports of the loopback interface."""

    def __init__(
        self,
        config: LocalConfig,
        model: Path,
        run_dir: Path,
        *,
        lora_rank: int = 0,
        gpus: Sequence[tuple[str, ...]] = (),
    ) -> None:
        """`lora_rank`: of the adapters that they should take. `gpus`: of each actor; none on CPUs."""
        self._config = config
        self._lora_rank = lora_rank
        self._gpus = gpus
        self._model = model
        self._run_dir = run_dir
        self._actors = [_Actor(i, address) for i, address in enumerate(addresses(config))]

    def start(self) -> None:
        """Start them, or take over those that an earlier command of this run has left. Raises ConfigError.

        Of those, the ones that are too many, or were started with other settings, are ended.
        """
        left = {address: pid for address, pid in _read_known(self._run_dir).items() if _is_actor(pid, address)}
        for actor in self._actors:
            if actor.address in left and self._is_as_wanted(actor):
                actor.pid = left.pop(actor.address)
                actor.log_offset = self._log_path(actor).stat().st_size  # what others before it said is over
                print(f"actor {actor.address} is still running (pid {actor.pid}) and is used again", flush=True)
        for address, pid in left.items():
            print(f"actor {address} is of an earlier command (pid {pid}) and is ended", flush=True)
            _end(pid, address)
        for actor in self._actors:
            if not actor.pid and (_is_taken(actor.address) or _is_loading(actor.address)):
                raise ConfigError(f"{actor.address} is in use by another process; stop it, or set local.base_port")
        self._write_known()
        for actor in self._actors:
            if not actor.pid:
                self._spawn(actor)
                print(f"actor {actor.address} loads the model; its log is {self._log_path(actor)}", flush=True)

    def restart_dead(self) -> None:
        """Start those again that have died, and say so. Raises ConfigError if one cannot live."""
        for actor in self._actors:
            code = self._exit_code(actor)
            if code is None:
                continue
            _kill_group(actor.pid)  # what it has left of vLLM's processes
            if time.monotonic() - actor.started_at > _SETTLED_S:
                actor.num_restarts = 0
            actor.num_failed_starts = 0 if self._was_ready(actor) else actor.num_failed_starts + 1
            is_hopeless = actor.num_failed_starts >= _MAX_FAILED_STARTS or actor.num_restarts >= _MAX_RESTARTS
            words = self._last_words(actor)
            if code == _USER_ERROR or is_hopeless:
                raise ConfigError(f"actor {actor.address} does not start: {words}")
            # By a signal it ends without words: the last ones would be of something else.
            why = f" ({words})" if code > 0 and words != self._see(actor) else ""
            print(f"actor {actor.address} ended with {code}, and is started again{why}; {self._see(actor)}", flush=True)
            actor.num_restarts += 1
            self._spawn(actor)

    def terminate(self) -> None:
        """Ask all to stop."""
        for actor in self._actors:
            with contextlib.suppress(ProcessLookupError):
                if actor.pid:
                    os.kill(actor.pid, signal.SIGTERM)

    def end(self, deadline: float) -> None:
        """Wait for all until `deadline` (time.monotonic), then kill what is left of their process groups."""
        while time.monotonic() < deadline and any(
            actor.pid and self._exit_code(actor) is None for actor in self._actors
        ):
            time.sleep(_POLL_S)
        for actor in self._actors:
            if actor.pid:
                _kill_group(actor.pid)
            if actor.process is not None:
                actor.process.wait()
        _known_path(self._run_dir).unlink(missing_ok=True)

    def __str__(self) -> str:
        return ", ".join(f"{actor.address} (pid {actor.pid})" for actor in self._actors)

    # ------------------------------------------------------------------------------------------------------ parts

    def _settings(self, actor: _Actor) -> str:
        """Its configuration file, which says in a comment what else it is started with."""
        settings = dict(self._config.actor)
        settings.setdefault("idle_exit_s", _IDLE_EXIT_S)
        settings.setdefault("grace_s", 1.0)
        if not self._gpus and settings.get("engine", "vllm") == "vllm" and len(self._actors) > 1:
            # Two engines on one core would wait for each other at every step.
            cores = sorted(os.sched_getaffinity(0))
            settings["vllm"] = {"cpu_cores": str(cores[actor.index % len(cores)]), **settings.get("vllm", {})}
        if settings.get("engine", "vllm") == "vllm" and self._lora_rank:
            settings["vllm"] = {"max_lora_rank": self._lora_rank, **settings.get("vllm", {})}
        gpus = f", CUDA_VISIBLE_DEVICES={self._gpus_of(actor)}" if self._gpus else ""
        return f"# --model {self._model} --listen {actor.address}{gpus}\n{yaml.safe_dump(settings, sort_keys=False)}"

    def _gpus_of(self, actor: _Actor) -> str:
        return ",".join(self._gpus[actor.index])

    def _is_as_wanted(self, actor: _Actor) -> bool:
        """Whether one that is running was started as it would be now."""
        try:
            return self._config_path(actor).read_text() == self._settings(actor)
        except OSError:
            return False

    def _spawn(self, actor: _Actor) -> None:
        environment = dict(os.environ)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus_of(actor)
        write_whole(self._config_path(actor), self._settings(actor))
        command = [sys.executable, "-m", "actor", "--config", str(self._config_path(actor))]
        command += ["--model", str(self._model), "--listen", actor.address]
        with self._log_path(actor).open("ab") as log, put_off():
            actor.log_offset = log.tell()
            actor.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            actor.pid, actor.started_at = actor.process.pid, time.monotonic()
        self._write_known()

    def _exit_code(self, actor: _Actor) -> int | None:
        """None while it runs; -1 if nobody can know."""
        if actor.process is not None:
            return actor.process.poll()
        return None if _is_actor(actor.pid, actor.address) else -1

    def _was_ready(self, actor: _Actor) -> bool:
        return actor.process is None or f" ready on {actor.address}" in self._said(actor)

    def _last_words(self, actor: _Actor) -> str:
        """Its own line, or else the end of a traceback, if there is one."""
        said = self._said(actor)
        found = _OWN_LINE.findall(said) or _TRACEBACK_END.findall(said)
        return found[-1] if found else self._see(actor)

    def _see(self, actor: _Actor) -> str:
        return f"see {self._log_path(actor)}"

    def _said(self, actor: _Actor) -> str:
        """What it has logged since its start."""
        with self._log_path(actor).open("rb") as log:
            log.seek(actor.log_offset)
            return log.read().decode(errors="replace")

    def _config_path(self, actor: _Actor) -> Path:
        return self._run_dir / f"actor-{actor.index}.yaml"

    def _log_path(self, actor: _Actor) -> Path:
        return _log_path(self._run_dir, actor.index)

    def _write_known(self) -> None:
        write_whole(_known_path(self._run_dir), json.dumps({actor.address: actor.pid for actor in self._actors}))


def _log_path(run_dir: Path, index: int) -> Path:
    return run_dir / "logs" / f"actor-{index}.log"


def _known_path(run_dir: Path) -> Path:
    return run_dir / "actors.json"


def _read_known(run_dir: Path) -> dict[str, int]:
    """Address to process id, in the order of the actors."""
    try:
        known: dict[str, int] = json.loads(_known_path(run_dir).read_text())
    except (OSError, ValueError):
        return {}
    return known


def _is_actor(pid: int, address: str) -> bool:
    """Whether this process is the actor of that address (a pid can be anybody's by now)."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"actor" in command and address.encode() in command


def _is_loading(address: str) -> bool:
    """Whether an actor that does not listen yet will listen there."""
    return any(_is_actor(int(path.name), address) for path in Path("/proc").iterdir() if path.name.isdigit())


def _is_taken(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return True
    return False


def _end(pid: int, address: str) -> None:
    """End an actor that is not our child, and wait until it is gone. Raises ConfigError for one that stays."""
    _kill_group(pid)
    deadline = time.monotonic() + _END_S
    while _is_actor(pid, address):
        if time.monotonic() > deadline:
            raise ConfigError(f"{address} is held by process {pid}, which cannot be ended; set local.base_port")
        time.sleep(_POLL_S)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
