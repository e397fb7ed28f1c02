"""`MediaItem`: an encoded file, frames, pixels, processed tensors, or only the hash of one of them."""

from common.errors import InvalidRequest
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.types import Frames, MediaItem, Modality
from common.wire.bounds import check_count
from common.wire.tensors import (
    named_tensors_from_proto,
    named_tensors_to_proto,
    tensor_from_proto,
    tensor_to_proto,
)

MODALITY = {Modality.IMAGE: pb.MODALITY_IMAGE, Modality.VIDEO: pb.MODALITY_VIDEO}
MODALITY_BACK = {number: modality for modality, number in MODALITY.items()}
# More than any server takes.
_MAX_FRAMES = 4096
# What only the other modality can be.
_NOT_OF = {Modality.IMAGE: "frames", Modality.VIDEO: "encoded"}


def media_to_proto(item: MediaItem) -> pb.MediaItem:
    """`MediaItem` as a message."""
    message = pb.MediaItem(modality=MODALITY[item.modality], sha256=item.sha256)
    if item.encoded is not None:
        message.encoded = item.encoded
    elif item.frames is not None:
        message.frames.files.extend(item.frames.files)
    elif item.pixels is not None:
        message.pixels.CopyFrom(tensor_to_proto(item.pixels))
    elif item.processed:
        message.processed.tensors.extend(named_tensors_to_proto(item.processed))
    if item.min_pixels is not None:
        message.processor.min_pixels = item.min_pixels
    if item.max_pixels is not None:
        message.processor.max_pixels = item.max_pixels
    if item.frames_per_second is not None:
        message.frames_per_second = item.frames_per_second
    return message


def media_from_proto(message: pb.MediaItem, field: str) -> MediaItem:
    """Raises InvalidRequest, naming the field."""
    modality = MODALITY_BACK.get(message.modality)
    if modality is None:
        raise InvalidRequest(f"{field}.modality", "must be MODALITY_IMAGE or MODALITY_VIDEO")
    if len(message.sha256) not in (0, 32):
        raise InvalidRequest(f"{field}.sha256", f"must be 32 bytes, not {len(message.sha256)}")
    content = message.WhichOneof("content")
    if content is None and not message.sha256:
        raise InvalidRequest(f"{field}.content", "is missing; send it, or the sha256 of what is stored")
    if content == _NOT_OF[modality]:
        raise InvalidRequest(f"{field}.{content}", f"is no content of {pb.Modality.Name(message.modality)}")
    if message.HasField("frames_per_second") and modality is not Modality.VIDEO:
        raise InvalidRequest(f"{field}.frames_per_second", "has no effect on images")
    check_count(message.frames.files, f"{field}.frames.files", _MAX_FRAMES)
    processor = message.processor
    item = MediaItem(
        sha256=message.sha256,
        modality=modality,
        encoded=message.encoded if content == "encoded" else None,
        pixels=tensor_from_proto(message.pixels, f"{field}.pixels") if content == "pixels" else None,
        processed=named_tensors_from_proto(message.processed.tensors, f"{field}.processed.tensors"),
        min_pixels=processor.min_pixels if processor.HasField("min_pixels") else None,
        max_pixels=processor.max_pixels if processor.HasField("max_pixels") else None,
        frames=Frames(tuple(message.frames.files)) if content == "frames" else None,
        frames_per_second=message.frames_per_second if message.HasField("frames_per_second") else None,
    )
    if content == "processed" and not item.processed:
        raise InvalidRequest(f"{field}.processed.tensors", "is empty")
    return item
