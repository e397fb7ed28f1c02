"""What holds for every test: markers and time limits by folder, and no process left behind.

A test belongs to the folder that it lies in (`unit/`, `contract/`, `integration/`, `faults/`, `fuzz/`, `gpu/`) and gets
the marker of that name. GPU tests and slow ones are left out unless asked for with `-m gpu`, `-m slow`.
"""

import os
import signal
import time
import uuid
from pathlib import Path

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


def pytest_configure(config: pytest.Config) -> None:
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


def _leaked_processes() -> list[psutil.Process]:
    """Processes other than this one that carry this session's variable, without the helpers of multiprocessing."""
    session = os.environ[_SESSION_VARIABLE]
    leaked = []
    for process in psutil.process_iter():
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


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session if a process that it started is still there after a grace period, and end that process."""
    deadline = time.monotonic() + _EXIT_GRACE_S
    while (leaked := _leaked_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in leaked:
        try:
            line = f"LEAKED PROCESS {process.pid}: {' '.join(process.cmdline())[:200]}"
            process.kill()
        except psutil.NoSuchProcess:
            continue
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"\n{line}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
