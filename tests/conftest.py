"""What holds for every test: markers and time limits by folder, who runs beside whom, and no process left behind.

A test belongs to the folder that it lies in (`unit/`, `contract/`, `integration/`, `faults/`, `fuzz/`, `gpu/`) and gets
the marker of that name. GPU tests and slow ones are left out unless asked for with `-m gpu`, `-m slow`.
"""

import contextlib
import fcntl
import functools
import os
import signal
import time
import uuid
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

# Fewer examples than usual for each property: there are many. None has a deadline: machines are busy at times.
hypothesis.settings.register_profile("outrider", max_examples=50, deadline=None)
hypothesis.settings.load_profile("outrider")

_TESTS = Path(__file__).resolve().parent
# Seconds for one test of each folder, where the test does not say otherwise.
_TIMEOUT_S = {"unit": 60, "contract": 60, "integration": 600, "faults": 600, "fuzz": 60, "gpu": 600}

# Every process that a test starts inherits this variable, also one that has lost its parent: so a leak is seen whoever
# its parent is by now.
_SESSION_VARIABLE = "OUTRIDER_TEST_SESSION"
# A helper of multiprocessing lives until its parent ends: no leak.
_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
_EXIT_GRACE_S = 10.0
_LEAKED: list[str] = []


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is a process of pytest-xdist, which another one has started and will end."""
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    if not _is_worker(config):
        os.environ[_SESSION_VARIABLE] = uuid.uuid4().hex
    # In the background a shell has SIGINT ignored, and processes inherit that. Not by a `preexec_fn` of those that need
    # it: with one, Python forks where it would not, and gRPC's threads do not survive that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not config.option.markexpr:
        config.option.markexpr = "not gpu and not slow"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        if folder not in _TIMEOUT_S:
            raise pytest.UsageError(f"{item.path} lies in none of tests/{{{','.join(_TIMEOUT_S)}}}")
        item.add_marker(folder)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_TIMEOUT_S[folder]))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # its time limit does not count while it waits
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test marked `alone` run beside no test of another worker, and the others beside each other."""
    is_alone = item.get_closest_marker("alone") is not None
    turn, place = os.open(_TESTS, os.O_RDONLY), os.open(__file__, os.O_RDONLY)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)  # behind one that waits to be alone, all others wait
        fcntl.flock(place, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        return (yield)
    finally:
        for held in (place, turn):
            fcntl.flock(held, fcntl.LOCK_UN)  # a process that the test forked may still have it open
            os.close(held)


def _leaked_processes(candidates: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those other than this process that carry the session's variable, without the helpers of multiprocessing."""
    session = os.environ[_SESSION_VARIABLE]
    leaked = []
    for process in candidates:
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(_SESSION_VARIABLE) != session:
                continue
            command = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if not any(helper in command for helper in _HELPERS):
            leaked.append(process)
    return leaked


def _killed(find: Callable[[], Iterable[psutil.Process]]) -> list[str]:
    """End what is still there after a grace period; a line for each."""
    deadline = time.monotonic() + _EXIT_GRACE_S
    while (leaked := _leaked_processes(find())) and time.monotonic() < deadline:
        time.sleep(0.1)
    lines = []
    for process in leaked:
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(f"LEAKED PROCESS {process.pid}: {' '.join(process.cmdline())[:200]}")
            process.kill()
    return lines


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker's tests left behind would have ended with the worker."""
    _LEAKED.extend(getattr(node, "workeroutput", {}).get("leaked", []))


@pytest.hookimpl(trylast=True)  # when fixtures are torn down, and pytest-xdist has ended its workers
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session if a process that it started is still there after a grace period, and end that process."""
    if _is_worker(session.config):
        children = functools.partial(psutil.Process().children, recursive=True)
        session.config.workeroutput["leaked"] = _killed(children)  # type: ignore[attr-defined]
        return
    _LEAKED.extend(_killed(psutil.process_iter))
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for line in _LEAKED:
        if reporter is not None:
            reporter.write_line(f"\n{line}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
