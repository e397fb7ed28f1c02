"""A full update of a live actor against one, parameter by parameter, of vLLM's own server.

As bytes/s. The peer does what `with client.weight_update(): client.update_named_param(name, tensor)` of TRL's
`VLLMClient` does for each parameter: a request to the server and a broadcast beside it; vLLM loads each as it comes.
(TRL's trainer of today announces all in one request. What is compared is the way per parameter.) Where TRL broadcasts
with NCCL, this peer has the actor's Gloo: `gloo_weight_transfer`; it has the same cores and does not stop generation.
While one side has its turn, the other one's processes do nothing: those of vLLM's server, which spin, are stopped.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks import harness, vllm_server
from benchmarks.update_world import ENGINE, World

GOAL = 5.0
_TIMEOUT_S = 120.0
_WORKER = "benchmarks.gloo_weight_transfer"


def main() -> None:
    """Run the one case and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update_vs_per_parameter", description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    pairs: int = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as temporary, World(Path(temporary), 1) as world:
        megabytes: float = world.num_bytes / 1e6
        of_actor = set(psutil.Process().children(recursive=True))
        with _server(Path(temporary)) as address, _Client(address, world, str(Path(temporary) / "model")) as client:
            of_peer = set(psutil.Process().children(recursive=True)) - of_actor
            harness.say("checking that the peer's weights arrive")
            client.check()

            def ours() -> float:
                with harness.stopped(of_peer):
                    return megabytes / world.update()[0]

            comparison = harness.compare(
                "one_receiver", ours, lambda: megabytes / client.update(), pairs=pairs, goal=GOAL, unit="MB/s"
            )
    harness.report("update_vs_per_parameter", {"one_receiver": comparison})


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    from benchmarks.gloo_weight_transfer import BACKEND

    harness.say("starting vLLM's server")
    settings = {
        **{name: value for name, value in ENGINE.items() if name != "enforce_eager"},
        "kv_cache_gib": 1,
        "max_images": 1,
        "worker_extension_cls": f"{_WORKER}.WorkerExtension",
        "weight_transfer_config": json.dumps({"backend": BACKEND}),
    }
    # Its endpoints for weights exist only so.
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    with vllm_server.serve(
        "http", folder / "model", folder / "peer.log", environment, settings, "--enforce-eager"
    ) as address:
        yield address


class _Client:
    """What TRL's `VLLMClient` does with the model of `world`."""

    def __init__(self, address: str, world: World, model: str) -> None:
        from benchmarks.gloo_weight_transfer import group_spec
        from common.collective import BroadcastGroup
        from learner.weights.transport import TorchTransport

        self._named_parameters = list(world.snapshot.trained.tensors())
        self._model = model
        self._url = f"http://{address}"
        self._session = requests.Session()
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._transport = TorchTransport("127.0.0.1")
        init_info = {
            "master_address": "127.0.0.1",
            "master_port": self._transport.port,
            "rank_offset": 1,
            "world_size": 2,
        }
        joined = self._executor.submit(self._post, "init_weight_transfer_engine", {"init_info": init_info})
        self._group = BroadcastGroup(group_spec("127.0.0.1", self._transport.port), 0)
        joined.result()

    def __enter__(self) -> "_Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._group.abort()
        self._session.close()
        self._executor.shutdown()

    def check(self) -> None:
        """Raise `UnequalWorkError` unless an update with other weights changes what the server says, and one with the
        right ones gives that back.
        """
        right, said = self._named_parameters, self._greedy_logprobs()
        self._named_parameters = [(name, tensor * 0.5) for name, tensor in right]
        self.update()
        if self._greedy_logprobs() == said:
            raise harness.UnequalWorkError("other weights have changed nothing")
        self._named_parameters = right
        self.update()
        harness.require_equal("logprobs", self._greedy_logprobs(), said)

    def _greedy_logprobs(self) -> Any:
        body = {"model": self._model, "prompt": [*range(10, 40)], "max_tokens": 8, "temperature": 0, "logprobs": 1}
        self._post("reset_prefix_cache", {})
        return self._post("v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]

    def update(self) -> float:
        """All parameters, one by one; seconds."""
        started_at = time.perf_counter()
        self._post("start_weight_update", {})
        for name, tensor in self._named_parameters:
            self._update_named_param(name, tensor)
        self._post("finish_weight_update", {})
        return time.perf_counter() - started_at

    def _update_named_param(self, name: str, tensor: Any) -> None:
        import torch

        update_info = {
            "names": [name],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.")],
            "shapes": [list(tensor.shape)],
        }
        answered = self._executor.submit(self._post, "update_weights", {"update_info": update_info})
        self._group.broadcast(tensor.reshape(-1).view(torch.uint8))
        answered.result()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        response = self._session.post(f"{self._url}/{path}", json=body, timeout=_TIMEOUT_S)
        if response.status_code != 200:
            raise RuntimeError(f"{path}: {response.status_code} {response.text[:2000]}")
        return response.json()


if __name__ == "__main__":
    main()
