"""vLLM's own servers as peers, with the actor's engine settings: OpenAI's API over HTTP, and `--grpc`."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks import generation
from tests.helpers.launched import free_ports

_START_S = 300.0
_LAUNCHERS = {
    "http": "vllm.entrypoints.openai.api_server",
    "grpc": "vllm.entrypoints.launchers.grpc_server",
}


@contextmanager
def serve(
    kind: str,
    model: Path,
    log: Path,
    environment: Mapping[str, str],
    settings: Mapping[str, object] = generation.ENGINE,
    *flags: str,
) -> Iterator[str]:
    """A server process of vLLM, "http" or "grpc", with these settings of its engine; its address once it answers."""
    settings = dict(settings)
    port = free_ports(1)
    command = [
        *(sys.executable, "-m", _LAUNCHERS[kind]),
        *("--model", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--limit-mm-per-prompt", json.dumps({"image": settings.pop("max_images"), "video": 0})),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--skip-mm-profiling"),
        # The same distribution as the actor's, so that the tokens can be compared.
        *("--logits-processors", "actor.engine_vllm.suppression:SuppressPlaceholders"),
    ]
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.pop("kv_cache_gib")),
        **environment,
    }
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += flags
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        _await_port(port, process, log)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_port(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}: {log.read_text()[-2000:]}")
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise RuntimeError(f"the server was not ready within {_START_S:g} s: {log.read_text()[-2000:]}")
