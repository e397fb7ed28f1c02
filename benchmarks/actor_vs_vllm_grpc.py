"""Tokens/s through the gRPC actor against vLLM's own `--grpc` server (`smg-grpc-servicer`).

What a turn is: `benchmarks.generation`. The peer gets token ids and fetches the image, a data URL, itself; its prompt
is tokenized beforehand, untimed, because its router would do that in Rust.
"""

import asyncio
import base64
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import generation, harness, peers, vllm_server

GOALS = {"tokens_8": 1.0, "tokens_128": 1.0}


@contextmanager
def over_vllm_grpc(model: Path, folder: Path, runner: asyncio.Runner) -> Iterator[generation.Generate]:
    """The server and a client of it."""
    packages = peers.grpc_servicer()
    sys.path.append(str(packages))
    environment = {
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(packages)]).strip(os.pathsep),
        "SMG_VLLM_MM_PROCESSOR": "inprocess",
        "SMG_VLLM_MM_MAX_INFLIGHT": str(generation.NUM_PROMPTS),
    }
    with vllm_server.serve("grpc", model, folder / "grpc.log", environment) as address:
        side = VllmGrpcSide(address, model, runner)
        try:
            yield side.generate
        finally:
            side.close()


class VllmGrpcSide:
    """A client of `VllmEngine`, from the stubs that come with the servicer."""

    def __init__(self, address: str, model: Path, runner: asyncio.Runner) -> None:
        import grpc
        from smg_grpc_proto import vllm_engine_pb2_grpc
        from transformers import AutoProcessor

        from examples.digits import data

        async def connect() -> Any:
            return grpc.aio.insecure_channel(address)

        self._runner = runner
        self._channel = runner.run(connect())
        self._generate = vllm_engine_pb2_grpc.VllmEngineStub(self._channel).Generate
        processor = AutoProcessor.from_pretrained(model)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": data.QUESTION}]}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        self._input_ids = processor.tokenizer(text)["input_ids"]

    def generate(self, name: str, images: list[bytes], sampling: dict[str, Any]) -> tuple[float, list[list[int]]]:
        """See `generation.Generate`."""
        from smg_grpc_proto import vllm_engine_pb2 as pb
        from smg_grpc_proto.generated import common_pb2

        parameters = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "logprobs": 0, **sampling}

        async def ask(index: int, image: bytes) -> list[list[int]]:
            url = "data:image/png;base64," + base64.b64encode(image).decode()
            request = pb.GenerateRequest(
                request_id=f"{name}-{index}",
                tokenized=pb.TokenizedInput(input_ids=self._input_ids),
                media_refs=pb.MediaRefs(items=[pb.MediaRef(modality=common_pb2.IMAGE, url=url)]),
                sampling_params=pb.SamplingParams(**parameters),
            )
            completions = {}
            async for response in self._generate(request, timeout=120):
                completion = response.complete
                harness.require_equal(
                    "numbers of logprobs", len(completion.output_logprobs.token_logprobs), len(completion.output_ids)
                )
                completions[completion.index] = list(completion.output_ids)
            return [completions[index] for index in sorted(completions)]

        async def ask_all() -> tuple[float, list[list[int]]]:
            started_at = time.perf_counter()
            groups = await asyncio.gather(*(ask(index, image) for index, image in enumerate(images)))
            return time.perf_counter() - started_at, [ids for group in groups for ids in group]

        return self._runner.run(ask_all())

    def close(self) -> None:
        """Close the connection."""
        self._runner.run(self._channel.close())


if __name__ == "__main__":
    generation.compare_actor("actor_vs_vllm_grpc", GOALS, over_vllm_grpc, __doc__)
