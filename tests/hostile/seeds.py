"""Small good requests of every shape, from which a fuzzer starts."""

import random
from collections.abc import Iterator

from common.media import media_hash
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.pb.weights.v1 import weights_pb2
from common.types import Frames
from tests.hostile import images


def generate_requests() -> Iterator[bytes]:
    """Each way to ask, with each kind of media."""
    rng = random.Random(0)
    encoded = [pb.MediaItem(encoded=images.picture(rng, name, size=4)) for name in ("PNG", "JPEG", "WEBP")]
    pixels = pb.MediaItem(pixels=pb.Tensor(dtype=pb.DTYPE_UINT8, shape=[2, 2, 3], data=bytes(12)))
    named = pb.NamedTensor(name="x", tensor=pb.Tensor(dtype=pb.DTYPE_BFLOAT16, shape=[2], data=bytes(4)))
    processed = pb.MediaItem(processed=pb.ProcessedMedia(tensors=[named]))
    frames = pb.EncodedFrames(files=[images.picture(rng, size=4) for _ in range(2)])
    video = pb.MediaItem(modality=pb.MODALITY_VIDEO, frames=frames, frames_per_second=2)
    by_hash = pb.MediaItem(sha256=bytes(32), processor=pb.ProcessorOptions(min_pixels=4, max_pixels=9))
    for item in (*encoded, pixels, processed, by_hash, video):
        item.modality = item.modality or pb.MODALITY_IMAGE
        parts = [pb.ChatPart(media_index=0), pb.ChatPart(text="?")]
        chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", parts=parts)])
        yield pb.GenerateRequest(group_id="g", chat=chat, media=[item]).SerializeToString()
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", parts=[pb.ChatPart(text="?")])])
    chat.template_arguments = '{"enable_thinking": true, "tools": [{"name": "x"}, null, 1.5]}'
    yield pb.GenerateRequest(group_id="g", chat=chat).SerializeToString()
    run = pb.PlaceholderRange(offset=1, length=2)
    tokens = pb.TokenPrompt(ids=[5, 1, 1, 6], placeholders=[run])
    yield pb.GenerateRequest(group_id="g", tokens=tokens, media=[pixels]).SerializeToString()
    for sampling in (
        pb.SamplingParams(n=4, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=1, stop=["x"], logit_bias={3: 1.0}),
        pb.SamplingParams(structured_output=pb.StructuredOutput(choice=pb.Choice(texts=["a", "b"]))),
        pb.SamplingParams(structured_output=pb.StructuredOutput(regex="a+"), bad_words=["x"]),
        pb.SamplingParams(num_beams=3, n=2, length_penalty=0.5),
        pb.SamplingParams(repetition_detection=pb.RepetitionDetection(max_pattern_size=4, min_count=3), top_logprobs=3),
    ):
        yield pb.GenerateRequest(group_id="g", text="hello", sampling=sampling).SerializeToString()


def stage_requests() -> Iterator[bytes]:
    """One and several buckets, a delta, an adapter."""
    parameter, bucket = weights_pb2.Parameter, weights_pb2.Bucket
    weight = parameter(name="w", dtype="F32", shape=[2, 2])
    lora = [
        parameter(name=f"base_model.model.m.lora_{name}.weight", dtype="F32", shape=shape, offset=offset)
        for name, shape, offset in (("A", [1, 4], 0), ("B", [3, 1], 16))
    ]
    several = [
        parameter(name="a", dtype="BF16", shape=[3]),
        parameter(name="b", dtype="F32", offset=16),
        parameter(name="c", dtype="U8", shape=[5], bucket=1),
    ]
    delta = [bucket(num_bytes=16, xxh3=1, delta_bytes=9, word_bytes=4)]
    manifests = (
        weights_pb2.Manifest(parameters=[weight], buckets=[bucket(num_bytes=16, xxh3=1, keep=True)]),
        weights_pb2.Manifest(parameters=several, buckets=[bucket(num_bytes=20), bucket(num_bytes=5)]),
        weights_pb2.Manifest(parameters=[weight], buckets=delta, base_version=2),
        weights_pb2.Manifest(parameters=lora, buckets=[bucket(num_bytes=28)], adapter="digits"),
    )
    for manifest in manifests:
        manifest.policy_version = 3
        yield weights_pb2.StageRequest(run_id="r", epoch=1, manifest=manifest, timeout_ms=9).SerializeToString()


def upload_streams() -> Iterator[bytes]:
    """An image in two chunks, a video, both in one call: messages of `PutMedia` as the files of an `EncodedFrames`."""
    rng = random.Random(0)
    image, frames = images.picture(rng, size=4), tuple(images.picture(rng, size=4) for _ in range(2))
    half, put = len(image) // 2, pb.PutMediaRequest
    in_chunks = [put(sha256=media_hash(image), num_bytes=len(image), chunk=image[:half]), put(chunk=image[half:])]
    sizes, data = [len(file) for file in frames], b"".join(frames)
    video = put(sha256=media_hash(Frames(frames)), num_bytes=len(data), frame_num_bytes=sizes, chunk=data)
    for messages in (in_chunks, [video], [*in_chunks, video]):
        yield pb.EncodedFrames(files=[message.SerializeToString() for message in messages]).SerializeToString()
