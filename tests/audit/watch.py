"""An actor process whose unpicklers are watched, and a learner that uses all that it serves."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.client import GrpcClient
from common.types import EpochSpec, RolloutRequest
from learner.rollouts.members import Member
from learner.weights.epoch import open_epoch
from learner.weights.snapshot import Snapshot
from learner.weights.transport import TorchTransport
from tests.audit.sitecustomize import LOG_VARIABLE
from tests.launched import ROOT

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class WatchedActor:
    """`pid` is the process with the socket."""

    address: str
    pid: int
    _log: Path
    _serving_from: int

    def unpickled(self, *, while_loading: bool = False) -> list[dict[str, Any]]:
        """What has been looked up, in the actor and its child processes, since it serves, or before that."""
        data = self._log.read_bytes()
        part = data[: self._serving_from] if while_loading else data[self._serving_from :]
        return [json.loads(line) for line in part.splitlines()]


@contextlib.contextmanager
def watched_actor(folder: Path, *arguments: str, module: str = "actor") -> Iterator[WatchedActor]:
    """Start one, ready to serve."""
    log, errors = folder / "audit.jsonl", folder / "errors.log"
    log.touch()
    paths = [str(_HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, LOG_VARIABLE: str(log), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", module, "--standalone", "--listen", "127.0.0.1:0", *arguments]
    with errors.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=file, text=True, stdin=subprocess.DEVNULL
        )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if " ready on " in line), None)
        assert line is not None, errors.read_text()[-3000:]
        address = line.split(" ready on ")[1].split(": ")[0]
        yield WatchedActor(address, process.pid, log, log.stat().st_size)
    finally:
        process.terminate()
        process.wait(timeout=30)


async def use_everything(address: str, request: RolloutRequest, update: Snapshot) -> None:
    """Rollouts with media uploaded and inline, a weight update, rollouts under the new version."""
    client = GrpcClient(address)
    try:
        status = await client.status()
        await client.server_info()
        await client.put_media([item.encoded for item in request.media if item.encoded is not None])
        await client.generate(request, timeout_s=60)
        transport = TorchTransport("127.0.0.1")
        world_size = 1 + status.num_workers
        spec = EpochSpec("run", 1, "127.0.0.1", transport.port, world_size, 0, "gloo", timeout_s=60.0)
        member = Member(address, client, 1, status.actor_id, status.state, status=status)
        epoch = await open_epoch(spec, [member], transport)
        await epoch.send(*update.update(full=True))
        await epoch.abort()
        sampled = await client.generate(request, timeout_s=60)
        versions = {span.policy_version for completion in sampled.completions for span in completion.version_spans}
        assert versions == {update.version}
    finally:
        await client.close()
