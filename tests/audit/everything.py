"""A learner and an operator that use all that an actor serves."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from common.client import GrpcClient
from common.media import content_hash, decode_image, media_hash
from common.pb.admin.v1 import admin_pb2
from common.pb.admin.v1.admin_pb2_grpc import AdminServiceStub
from common.rpc.channel import open_channel
from common.tensors import pixels_hash, tensor_of, tensors_hash
from common.types import (
    ChatMessage,
    ChatPrompt,
    EpochSpec,
    Frames,
    MediaItem,
    MediaPart,
    Modality,
    RepetitionDetection,
    RolloutRequest,
    SamplingParams,
    TextPart,
    TextPrompt,
    TokenPrompt,
)
from learner.rollouts.members import Member
from learner.weights.buckets import Update
from learner.weights.deltas import Deltas
from learner.weights.epoch import UpdateTimes, open_epoch
from learner.weights.snapshot import Snapshot
from learner.weights.transport import TorchTransport


def every_request(images: tuple[bytes, bytes]) -> tuple[RolloutRequest, ...]:
    """Each kind of prompt, of media and of sampling that both engines know. The images are files of one size.

    The first request has the first image.
    """
    chat = ChatPrompt((ChatMessage("user", (MediaPart(0), TextPart("what is this?"))),))
    sent, uploaded = (MediaItem(content_hash(image), image) for image in images)
    pixels = tensor_of(np.asarray(decode_image(images[0], "image", max_pixels=2**20)))
    raw = MediaItem(pixels_hash(pixels), pixels=pixels)
    frames = Frames(images)
    video = MediaItem(media_hash(frames), frames=frames, modality=Modality.VIDEO, frames_per_second=2.0)
    request = RolloutRequest("g", chat, (sent,), SamplingParams(n=2, max_tokens=4))
    text = replace(request, media=(), prompt=TextPrompt("words"), return_text=True)
    scored = SamplingParams(max_tokens=4, top_logprobs=2, prompt_logprobs=True, prompt_top_logprobs=2)
    bounded = SamplingParams(
        n=2,
        max_tokens=8,
        seed=3,
        stop=("x",),
        bad_words=("y",),
        logit_bias=((65, 1.0),),
        repetition_detection=RepetitionDetection(max_pattern_size=2),
    )
    return (
        request,
        replace(request, media=(raw,)),
        replace(request, media=(video,)),
        replace(request, media=(uploaded,), sampling=scored),
        replace(request, sampling=SamplingParams(n=2, num_beams=2, max_tokens=4)),
        replace(text, sampling=bounded),
        replace(text, prompt=TokenPrompt((65, 66, 67))),
    )


async def use_everything(
    address: str,
    requests: Sequence[RolloutRequest],
    snapshots: tuple[Snapshot, Snapshot],
    adapter: Update,
) -> int:
    """Each request, before and after a full update, a delta and an adapter; uploads, a pause. The number of groups."""
    client, channel = GrpcClient(address), open_channel(address)
    try:
        status = await client.status()
        await client.server_info()
        await client.put_media([item.encoded for item in requests[3].media if item.encoded is not None])
        before = await client.generate(replace(requests[0], return_processed=True), timeout_s=60)
        tensors = before.prompt.media[0].processed
        as_tensors = replace(requests[0], media=(MediaItem(tensors_hash(tensors), processed=tensors),))
        for request in (*requests, as_tensors):
            await client.generate(request, timeout_s=60)

        operator = AdminServiceStub(channel)  # type: ignore[no-untyped-call]
        await operator.Pause(admin_pb2.PauseRequest())
        await operator.Resume(admin_pb2.ResumeRequest())

        transport = TorchTransport("127.0.0.1")
        world_size = 1 + status.num_workers
        spec = EpochSpec("run", 1, "127.0.0.1", transport.port, world_size, 0, "gloo", timeout_s=60.0)
        member = Member(address, client, 1, status.actor_id, status.state, status=status)
        epoch = await open_epoch(spec, [member], transport)
        times = await epoch.send(snapshots[0].update(full=True, keep=True))
        deltas = Deltas(enabled=True)
        deltas.sent(snapshots[0], [member], UpdateTimes(1e6, 0.0, times.num_bytes))  # slow enough for a delta
        delta = await deltas.choose(snapshots[1], [member])
        assert delta is not None
        await epoch.send(delta)
        await epoch.send(adapter)
        await epoch.abort()

        for request in (*requests, as_tensors):
            sampled = await client.generate(request, timeout_s=60)
            spans = [span for completion in sampled.completions for span in completion.version_spans]
            assert {span.policy_version for span in spans} == {adapter[0].policy_version}
        return 1 + 2 * (len(requests) + 1)
    finally:
        await channel.close()
        await client.close()
