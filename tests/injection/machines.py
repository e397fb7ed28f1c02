"""Machines of their own for processes of a test: network namespaces on one bridge, whose cables can be pulled."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil

from tests.helpers.launched import ROOT
from tests.injection.fault import VARIABLE, Fault, Kind, Phase, moment, of_rank
from tests.manifests.runner.network import Network
from tests.manifests.runner.sandbox import CARD


def is_permitted() -> bool:
    """Whether this process may make machines."""
    if any(shutil.which(command) is None for command in ("unshare", "nsenter", "ip", "tc")):
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 0


class Machine:
    """A network namespace with one command in it, which is started again and again."""

    def __init__(self, name: str, network: Network, number: int, directory: Path) -> None:
        """`number`: how many have been plugged into the network before."""
        self.name = name
        self._fault_path = directory / f"{name}.fault"
        self._log = directory / f"{name}.log"
        self._link = f"veth{number}"
        self._holder = subprocess.Popen(
            [sys.executable, "-m", "tests.manifests.runner.sandbox", name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()
        self.address = asyncio.run(network.plug(self._holder.pid))
        self._tell({"up": f"{self.address}/{network.prefix}", "gateway": network.node})
        self._inside("ip", "route", "del", "default")  # no name server is out there: a look-up is to fail at once
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str) -> None:
        """Start its process, a module of Python's."""
        settings = {"GLOO_SOCKET_IFNAME": CARD, "OMP_NUM_THREADS": "1"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._enter, sys.executable, "-m", *command],
                cwd=ROOT,
                env={**os.environ, **settings, VARIABLE: str(self._fault_path)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def arm(self, kind: Kind, phase: Phase, version: int, rank: str | None = None) -> None:
        """Have its process, or this rank among its processes, do this fault to itself."""
        Fault(kind, phase, version, self._link, os.getpid()).arm(of_rank(self._fault_path, rank))

    def happened_at(self, rank: str | None = None) -> float | None:
        """When the armed fault happened."""
        try:
            return float(moment(of_rank(self._fault_path, rank)).read_text())
        except FileNotFoundError:
            return None

    @property
    def ended(self) -> bool:
        """Whether its process has."""
        return self._process is None or self._process.poll() is not None

    @property
    def said(self) -> str:
        """The end of what it wrote."""
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        """To its process and all that this has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def cut(self) -> None:
        """Pull its cable."""
        subprocess.run(["ip", "link", "set", self._link, "down"], check=True)

    def heal(self) -> None:
        """Undo a stop, a cut or a slow link."""
        self.signal(signal.SIGCONT)
        subprocess.run(["ip", "link", "set", self._link, "up"], check=True)
        # Of a card whose queue is the usual one already, `tc` only says so.
        subprocess.run(["tc", "qdisc", "del", "dev", self._link, "root"], check=False, stderr=subprocess.DEVNULL)
        self._inside("tc", "qdisc", "del", "dev", CARD, "root", check=False)

    def kill(self) -> None:
        """End its process, and what it has left behind: torchrun gives each rank a session of its own."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(VARIABLE) == str(self._fault_path):
                    process.kill()
        if self._process is not None:
            self._process.wait()

    def close(self) -> None:
        """Take the machine away."""
        self.kill()
        self._holder.kill()
        self._holder.wait()

    @property
    def _enter(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]

    def _inside(self, *command: str, check: bool = True) -> None:
        subprocess.run([*self._enter, *command], check=check, stderr=None if check else subprocess.DEVNULL)

    def _tell(self, command: dict[str, str]) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.write(json.dumps(command) + "\n")
        self._holder.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "done\n":
            raise RuntimeError(f"there is no machine {self.name}: network namespaces need root, pyroute2 and `ip`")


class Machines:
    """Some of them, in a network of their own: this process must have left that of the host (`kernel.unshare`)."""

    def __init__(self, names: Sequence[str], directory: Path) -> None:
        network = Network()
        network.set_up()
        self.by_name = {name: Machine(name, network, i, directory) for i, name in enumerate(names)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.by_name.values():
            machine.close()
