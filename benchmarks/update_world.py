"""What the benchmarks of weight updates share: real actors, a learner's end of the weight path, and bare receivers.

The model is a Qwen2.5-VL of some 460 MB in 249 tensors with random weights; the actors are `python -m actor` processes
with the real vLLM. Everything goes as in a run: gRPC for control, Gloo for the bytes, checksums, swap.
"""

import asyncio
import functools
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.harness import require_equal, say
from benchmarks.serving import vllm_actor
from benchmarks.side import Process

ENGINE = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "enforce_eager": True,
}
_LAYERS = 18
_TIMEOUT_S = 120.0


def build_model(folder: Path) -> Path:
    """Write the checkpoint; returns `folder`."""
    from common import torchvision_ops

    torchvision_ops.install()
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    from examples.digits.model import build_processor, model_config

    config = model_config()
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 768, 2048, _LAYERS
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 12, 4, ["full_attention"] * _LAYERS
    text.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    config.vision_config.out_hidden_size = text.hidden_size
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


class World:
    """A model in this process, actors that follow it, and receivers that only receive.

    `update` is a whole update of the live actors: gather, wire, verify, swap. `broadcast` is the wire alone.
    """

    def __init__(self, folder: Path, num_actors: int, *, dtype: Any = None, host: str = "127.0.0.1") -> None:
        """`dtype`: in which weights are sent; None: the model's float32."""
        self._folder = folder
        self._dtype = dtype
        self._num_actors = num_actors
        self._host = host
        self._stack = ExitStack()
        self.version = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # ends what has been started, when something fails
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def _start(self, stack: ExitStack) -> None:
        say(f"starting {self._num_actors} actor(s) with vLLM (about a minute each)")
        model_dir = build_model(self._folder / "model")
        from transformers import AutoModelForImageTextToText

        from common.collective import BroadcastGroup
        from learner.weights.deltas import Deltas
        from learner.weights.snapshot import Snapshotter
        from learner.weights.transport import TorchTransport

        self.model: Any = AutoModelForImageTextToText.from_pretrained(model_dir)
        self._deltas = Deltas(enabled=True)
        self._runner = stack.enter_context(asyncio.Runner())
        addresses = [
            stack.enter_context(
                vllm_actor(model_dir, self._folder / f"actor-{i}.log", {**ENGINE, "cpu_cores": repr(self._cores(i))})
            )
            for i in range(self._num_actors)
        ]
        self._snapshotter = Snapshotter(
            self.model, ["model.visual"], is_sender=True, bucket_bytes=64 * 2**20, dtype=self._dtype
        )
        self._transport = TorchTransport(self._host)
        self._epoch = self._runner.run(self._open(addresses))
        stack.callback(lambda: self._runner.run(self._close()))
        self.snapshot = self._take()
        self.num_bytes = self.snapshot.trained.num_bytes
        side = [sys.executable, "-m", "benchmarks.update_side", self._host, str(self._transport.port)]
        self._receivers = []
        for rank in range(1, self._num_actors + 1):
            # Started one after the other: they meet when all are there, and so does this process.
            arguments = [*side, str(rank), str(self._num_actors + 1), str(self.num_bytes)]
            self._receivers.append(stack.enter_context(Process(arguments, self._folder / f"side-{rank}.log")))
        for receiver in self._receivers:
            receiver.send({})
        self._group = BroadcastGroup(self._bare_spec(), 0)
        stack.callback(self._group.abort)
        for receiver in self._receivers:
            receiver.receive()
        self._flat = _flat(self.snapshot.trained.buffers)
        say(f"{self.num_bytes / 1e6:.0f} MB in {len(self.snapshot.trained.parameters)} tensors")
        for _ in range(2):
            self.update()
            self.broadcast()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, coroutine: Any) -> Any:
        """Run something on the event loop of the learner's end."""
        return self._runner.run(coroutine)

    @property
    def client(self) -> Any:
        """Of the first actor."""
        return self._epoch.members[0].client

    def update(self) -> tuple[float, Any]:
        """Bring all actors to the next version: seconds in all, and the `UpdateTimes`."""
        seconds, times = self.run(self.next_update())
        return seconds, times

    async def next_update(self, *, gather: bool = True) -> tuple[float, Any]:
        """As `update`. Without `gather` the last copy of the model is sent again, as another version."""
        from dataclasses import replace

        started_at = time.perf_counter()
        self.version += 1
        if gather:
            taken, self.snapshot = await self._begin_to_take()
        else:
            taken, self.snapshot = None, replace(self.snapshot, version=self.version)
        times = await self._epoch.send(self.snapshot.update(full=False))
        if taken is not None:
            await taken
        self._committed(times)
        return time.perf_counter() - started_at, times

    async def next_kept_update(self) -> tuple[float, Any]:
        """As `next_update`; the actors keep what they get for a delta."""
        started_at = time.perf_counter()
        self.version += 1
        self.snapshot = self._take()
        times = await self._epoch.send(self.snapshot.update(full=False, keep=True))
        self._committed(times)
        return time.perf_counter() - started_at, times

    async def next_delta(self) -> bool:
        """The next version as the learner's own choice has it; whether that was a delta."""
        self.version += 1
        self.snapshot = self._take()
        changes = await self._deltas.choose(self.snapshot, self._epoch.members)
        self._committed(await self._epoch.send(changes or self.snapshot.update(full=False, keep=True)))
        return changes is not None

    def _committed(self, times: Any) -> None:
        self._deltas.sent(self.snapshot, self._epoch.members, times)
        for member in self._epoch.members:
            member.version = self.version

    def broadcast(self) -> float:
        """Send the same bytes to as many bare receivers, in one piece; seconds."""
        for receiver in self._receivers:
            receiver.send({})
        started_at = time.perf_counter()
        self._group.broadcast(self._flat)
        seconds = time.perf_counter() - started_at
        from common.checksum import checksum

        for receiver in self._receivers:
            require_equal("bytes", receiver.receive()["checksum"], checksum(self._flat))
        return seconds

    def _take(self) -> Any:
        taken = self._snapshotter.take(self.version)
        assert taken is not None
        return taken

    async def _begin_to_take(self) -> tuple[Any, Any]:
        """The snapshot, which is still filled until the future is done: as in a run, beside the loop that sends it."""
        loop = asyncio.get_running_loop()
        begun = loop.create_future()

        def on_begin(snapshot: Any) -> None:
            loop.call_soon_threadsafe(begun.set_result, snapshot)

        taken = loop.run_in_executor(
            None,
            functools.partial(self._snapshotter.take, self.version, on_begin),
        )
        return taken, await begun

    async def _open(self, addresses: Sequence[str]) -> Any:
        from common.client import GrpcClient
        from common.types import EpochSpec
        from learner.rollouts.members import Member
        from learner.weights.epoch import open_epoch

        members = []
        for address in addresses:
            client = GrpcClient(address)
            status = await client.status()
            members.append(Member(address, client, 1, status.actor_id, status.state, status=status))
        spec = EpochSpec("benchmark", 1, self._host, self._transport.port, 1 + len(members), 0, "gloo", _TIMEOUT_S)
        return await open_epoch(spec, members, self._transport)

    def _bare_spec(self) -> Any:
        from common.types import EpochSpec

        return EpochSpec("bare", 1, self._host, self._transport.port, 1 + self._num_actors, 0, "gloo", _TIMEOUT_S)

    async def _close(self) -> None:
        await self._epoch.abort()
        for member in self._epoch.members:
            await member.client.close()

    def _cores(self, index: int) -> str:
        cores = sorted(os.sched_getaffinity(0))
        return ",".join(map(str, cores)) if self._num_actors == 1 else str(cores[index % len(cores)])


def _flat(buffers: Sequence[Any]) -> Any:
    import torch

    return torch.cat(list(buffers))
