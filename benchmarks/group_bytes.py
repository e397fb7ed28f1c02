"""Bytes on the wire of a group of 16 with one image of 1 MiB, over gRPC to a real actor.

Counted on the socket, in both directions: headers, acknowledgements and the request itself are in it. The peer is the
ideal of nothing but what has to cross: the image once, and the 16 results. In a second group with the same image the
image must not cross at all: the request is held against the image that it names.
"""

import argparse
import asyncio
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks import generation, harness
from benchmarks.counting_proxy import counting_proxy
from benchmarks.harness import say
from benchmarks.serving import vllm_actor

if TYPE_CHECKING:
    from common.client import GrpcClient

# At most 1.02 times the ideal; and a request for a known image at most a hundredth of it.
GOALS = {"first_group": 1 / 1.02, "second_group": 100.0}
GROUP_SIZE = 16
NUM_TOKENS = 64
# Noise, which no format makes smaller: a PNG of 1 MiB.
SIDE = 592


def main() -> None:
    """Measure some images and print the JSON line."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.group_bytes", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    pairs: int = parser.parse_args().pairs

    from common import torchvision_ops

    torchvision_ops.install()
    from examples.digits.model import build_model

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build_model(folder / "model", seed=0)
        say("starting the actor (about half a minute)")
        with vllm_actor(model, folder / "actor.log", generation.ENGINE) as address:
            ratios = asyncio.run(_measure(address, pairs))
    harness.report("group_bytes", {case: harness.Comparison(tuple(ratios[case]), goal) for case, goal in GOALS.items()})


async def _measure(address: str, pairs: int) -> dict[str, list[float]]:
    """The ideal's bytes / ours, of first groups; an image's bytes / those sent, of second groups."""
    from common.client import GrpcClient

    host, _, port = address.rpartition(":")
    ratios: dict[str, list[float]] = {case: [] for case in GOALS}
    async with counting_proxy(host, int(port)) as (proxy_address, counts):
        client = GrpcClient(proxy_address)
        await client.server_info()  # the connection stands
        for pair in range(1, pairs + 1):
            image = noise_png(pair)
            counts.take()
            num_result_bytes = await _ask(client, image, f"first-{pair}")
            first = counts.take()
            await _ask(client, image, f"second-{pair}")
            second = counts.take()
            ratios["first_group"].append((len(image) + num_result_bytes) / first.total)
            ratios["second_group"].append(len(image) / second.sent)
            say(
                f"pair {pair} of {pairs}: image {len(image)} and results {num_result_bytes} bytes; on the wire"
                f" {first.total} ({first.total / (len(image) + num_result_bytes):.4f}x), the second time"
                f" {second.sent} out and {second.received} back"
            )
        await client.close()
    return ratios


async def _ask(client: "GrpcClient", image: bytes, name: str) -> int:
    """Sample one group; the bytes of its prompt and completions as messages. Raises UnequalWorkError."""
    from common import wire
    from common.types import SamplingParams
    from examples.digits import data
    from learner.rollouts.sampler import build_request
    from learner.types import PromptSample

    prompt = PromptSample(row=0, messages=data.messages(), images=(image,), ground_truth="")
    sampling = SamplingParams(n=GROUP_SIZE, max_tokens=NUM_TOKENS, ignore_eos=True)
    group = await client.generate(build_request(name, prompt, sampling), timeout_s=120)
    lengths = [len(completion.token_ids) for completion in group.completions]
    harness.require_equal("lengths", lengths, [NUM_TOKENS] * GROUP_SIZE)
    messages = [wire.response_to_proto(group.prompt), wire.response_to_proto(group.completions)]
    return sum(message.ByteSize() for message in messages)


def noise_png(seed: int) -> bytes:
    """A PNG of about 1 MiB; another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
