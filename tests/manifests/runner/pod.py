"""One pod: its sandbox, its containers one after another, its probes, and how it ends."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.manifests.rendered import ROOT, Manifest
from tests.manifests.runner import image
from tests.manifests.runner.container import Spec
from tests.manifests.runner.network import Network
from tests.manifests.runner.packet_filter import Peer, Rules
from tests.manifests.runner.probe import Probe, watch
from tests.manifests.runner.volumes import Storage, Volumes

Phase = Literal["Pending", "Running", "Succeeded", "Failed"]


@dataclass
class Ending:
    """How a container of a pod has ended."""

    container: str
    code: int
    was_killed: bool


@dataclass
class Pod:
    """Made from a pod template; `run` brings it up and lasts until it has ended."""

    name: str
    namespace: str
    template: Manifest
    labels: dict[str, str]
    env: dict[str, str]
    storage: Storage
    network: Network
    # Something that others look at has changed: address, readiness, phase.
    changed: Callable[[], None]
    phase: Phase = "Pending"
    ready: bool = False
    terminating: bool = False
    restarts: int = 0
    address: str = ""
    endings: list[Ending] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _sandbox: asyncio.subprocess.Process | None = None
    _main_pid: int | None = None
    _was_killed: bool = False

    @property
    def spec(self) -> Manifest:
        """Of the template."""
        spec: Manifest = self.template["spec"]
        return spec

    @property
    def peer(self) -> Peer:
        """As network policies see it."""
        return Peer(self.address, self.labels, self.namespace)

    def log(self, container: str) -> str:
        """What a container has printed so far."""
        path = self._folder / f"{container}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def _folder(self) -> Path:
        return self.storage.folder / self.name

    @property
    def _volumes(self) -> Volumes:
        return Volumes(self.spec["volumes"], self._folder / "volumes", self.storage)

    @property
    def _group(self) -> int:
        group: int = self.spec["securityContext"]["fsGroup"]
        return group

    def refresh_secrets(self) -> None:
        """As the kubelet does it some time after a secret has changed."""
        for volume in self.spec["volumes"]:
            if "secret" in volume:
                self._volumes.write_secret(volume, self._group)

    # -------------------------------------------------------------------------------------------------- life

    async def start_sandbox(self) -> None:
        """The namespaces and the address; the pod can be filtered from here on, and nothing runs in it yet."""
        self._folder.mkdir(parents=True)
        self._volumes.make(self._group)
        self._sandbox = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.manifests.runner.sandbox", self.name),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        await self._sandbox_answers()
        address = await self.network.plug(self._sandbox.pid)
        await self._tell_sandbox({"up": f"{address}/{self.network.prefix}", "gateway": self.network.node})
        self.address = address

    async def filter(self, rules: Rules) -> None:
        """Install what network policies allow."""
        if self._sandbox is not None and self._sandbox.returncode is None:
            await self._tell_sandbox({"rules": rules.to_json(), "node": self.network.node})

    async def run(self) -> None:
        """From the first container to the last one's end."""
        try:
            for container in self.spec.get("initContainers", ()):
                process = await self._start(container)
                if (code := await process.wait()) != 0:
                    self.endings.append(Ending(container["name"], code, was_killed=False))
                    self.phase = "Failed"
                    return
            self.phase = "Running"
            [container] = self.spec["containers"]
            while True:
                code = await self._run_main(container)
                if self.terminating or self.spec.get("restartPolicy") == "Never":
                    self.phase = "Succeeded" if code == 0 else "Failed"
                    return
                self.restarts += 1
                await asyncio.sleep(0 if self.restarts == 1 else 10)
        finally:
            self.ready = False
            if self._sandbox is not None:
                self._sandbox.kill()
                await self._sandbox.wait()
            self.changed()
            self.ended.set()

    async def _run_main(self, container: Manifest) -> int:
        self._was_killed = False
        process = await self._start(container)
        probes = asyncio.create_task(self._probe(container))
        try:
            code = await process.wait()
        finally:
            probes.cancel()
            self._main_pid = None
            self.ready = False
            self.changed()
        self.endings.append(Ending(container["name"], code, self._was_killed))
        return code

    async def terminate(self) -> None:
        """As the kubelet ends a pod: preStop, SIGTERM, and SIGKILL when the grace period is over."""
        self.terminating = True
        self.changed()
        await self._stop_main(with_hook=True)

    async def _stop_main(self, *, with_hook: bool) -> None:
        [container] = self.spec["containers"]
        deadline = time.monotonic() + self.spec.get("terminationGracePeriodSeconds", 30)
        hook = container.get("lifecycle", {}).get("preStop", {})
        if with_hook and hook and self._main_pid is not None:
            await asyncio.sleep(hook["sleep"]["seconds"])
        pid = self._main_pid
        if pid is None:
            return
        self._signal(pid, signal.SIGTERM)
        while self._main_pid == pid:
            if time.monotonic() > deadline:
                self._was_killed = True
                self._signal(pid, signal.SIGKILL)
            await asyncio.sleep(0.1)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """A signal for the main process, out of nowhere."""
        if self._main_pid is not None:
            self._signal(self._main_pid, number)

    @staticmethod
    def _signal(pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    # ------------------------------------------------------------------------------------------------ probes

    async def _probe(self, container: Manifest) -> None:
        if "startupProbe" in container:
            passed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

            def decide(healthy: bool) -> None:
                if not passed.done():
                    passed.set_result(healthy)

            async with _task(watch(self.address, Probe.of(container["startupProbe"]), decide)):
                if not await passed:
                    await self._stop_main(with_hook=False)
                    return
        if "readinessProbe" not in container:
            self._set_ready(True)
        async with contextlib.AsyncExitStack() as stack:
            if "readinessProbe" in container:
                probe = Probe.of(container["readinessProbe"])
                await stack.enter_async_context(_task(watch(self.address, probe, self._set_ready)))
            unhealthy = asyncio.Event()
            if "livenessProbe" in container:
                probe = Probe.of(container["livenessProbe"])
                decide = lambda healthy: None if healthy else unhealthy.set()  # noqa: E731
                await stack.enter_async_context(_task(watch(self.address, probe, decide)))
            await unhealthy.wait()
        await self._stop_main(with_hook=False)

    def _set_ready(self, ready: bool) -> None:
        if ready is not self.ready:
            self.ready = ready
            self.changed()

    # -------------------------------------------------------------------------------------------- containers

    async def _start(self, container: Manifest) -> asyncio.subprocess.Process:
        root = self._folder / f"{container['name']}.root"
        root.mkdir(exist_ok=True)
        pid_file = self._folder / f"{container['name']}.pid"
        pid_file.unlink(missing_ok=True)
        path = self._folder / f"{container['name']}.json"
        path.write_text(json.dumps(asdict(self._container_spec(container, root, pid_file))))
        with (self._folder / f"{container['name']}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.manifests.runner.container", str(path)),
                cwd=ROOT,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        while process.returncode is None and not pid_file.exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.02)
        if container in self.spec["containers"] and pid_file.exists():
            self._main_pid = int(pid_file.read_text())
        return process

    def _container_spec(self, container: Manifest, root: Path, pid_file: Path) -> Spec:
        assert self._sandbox is not None
        context = self.spec["securityContext"]
        mounts = [
            {
                "source": str(self._volumes.path(mount["name"])),
                "target": mount["mountPath"],
                "readonly": bool(mount.get("readOnly")) or self._volumes.is_config(mount["name"]),
            }
            for mount in container["volumeMounts"]
        ]
        return Spec(
            sandbox_pid=self._sandbox.pid,
            root=str(root),
            checkout=str(ROOT),
            environment=image.python_folders(),
            files=image.etc(
                context["runAsUser"], self.name, self._host_names(), self.network.name_server, self.namespace
            ),
            mounts=mounts,
            readonly_root=container["securityContext"]["readOnlyRootFilesystem"],
            uid=context["runAsUser"],
            gid=context["runAsGroup"],
            groups=[context["fsGroup"]],
            command=[*container["command"], *container.get("args", ())],
            env={**image.environment(), **self.env, **self._env(container)},
            pid_file=str(pid_file),
            shares_processes=self.spec.get("shareProcessNamespace", False),
        )

    def _host_names(self) -> str:
        names = [self.name]
        if "subdomain" in self.spec:
            names.insert(0, f"{self.name}.{self.spec['subdomain']}.{self.namespace}.svc.cluster.local")
        return f"127.0.0.1 localhost\n{self.address} {' '.join(names)}\n"

    def _env(self, container: Manifest) -> dict[str, str]:
        values = {}
        for entry in container.get("env", ()):
            if "value" in entry:
                values[entry["name"]] = entry["value"]
                continue
            path = entry["valueFrom"]["fieldRef"]["fieldPath"]
            label = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
            if label is None:
                raise NotImplementedError(f"fieldRef {path}")
            values[entry["name"]] = self.labels[label[1]]
        return values

    # ----------------------------------------------------------------------------------------------- sandbox

    async def _tell_sandbox(self, command: dict[str, Any]) -> None:
        assert self._sandbox is not None
        assert self._sandbox.stdin is not None
        self._sandbox.stdin.write(json.dumps(command).encode() + b"\n")
        await self._sandbox_answers()

    async def _sandbox_answers(self) -> None:
        assert self._sandbox is not None
        assert self._sandbox.stdout is not None
        if await self._sandbox.stdout.readline() != b"done\n" and not self.terminating:
            raise RuntimeError(f"the sandbox of {self.name} has failed")


@contextlib.asynccontextmanager
async def _task(coroutine: Any) -> Any:
    task = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
