"""`MediaItem`: an encoded file, pixels, processed tensors, or only the hash of one of them."""

from common.errors import InvalidRequest, Unimplemented
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.types import MediaItem, Modality
from common.wire.tensors import (
    named_tensors_from_proto,
    named_tensors_to_proto,
    tensor_from_proto,
    tensor_to_proto,
)

_MODALITY = {Modality.IMAGE: pb.MODALITY_IMAGE, Modality.VIDEO: pb.MODALITY_VIDEO}


def media_to_proto(item: MediaItem) -> pb.MediaItem:
    """`MediaItem` as a message."""
    message = pb.MediaItem(modality=_MODALITY[item.modality], sha256=item.sha256)
    if item.encoded is not None:
        message.encoded = item.encoded
    elif item.pixels is not None:
        message.pixels.CopyFrom(tensor_to_proto(item.pixels))
    elif item.processed:
        message.processed.tensors.extend(named_tensors_to_proto(item.processed))
    if item.min_pixels is not None:
        message.processor.min_pixels = item.min_pixels
    if item.max_pixels is not None:
        message.processor.max_pixels = item.max_pixels
    return message


def media_from_proto(message: pb.MediaItem, field: str) -> MediaItem:
    """Raises InvalidRequest and Unimplemented, naming the field."""
    if message.modality == pb.MODALITY_VIDEO:
        raise Unimplemented(f"{field}.modality", "video is not taken by this version")
    if message.modality != pb.MODALITY_IMAGE:
        raise InvalidRequest(f"{field}.modality", "must be MODALITY_IMAGE")
    if len(message.sha256) not in (0, 32):
        raise InvalidRequest(f"{field}.sha256", f"must be 32 bytes, not {len(message.sha256)}")
    content = message.WhichOneof("content")
    if content is None and not message.sha256:
        raise InvalidRequest(f"{field}.content", "is missing; send it, or the sha256 of what is stored")
    processor = message.processor
    item = MediaItem(
        sha256=message.sha256,
        encoded=message.encoded if content == "encoded" else None,
        pixels=tensor_from_proto(message.pixels, f"{field}.pixels") if content == "pixels" else None,
        processed=named_tensors_from_proto(message.processed.tensors, f"{field}.processed.tensors"),
        min_pixels=processor.min_pixels if processor.HasField("min_pixels") else None,
        max_pixels=processor.max_pixels if processor.HasField("max_pixels") else None,
    )
    if content == "processed" and not item.processed:
        raise InvalidRequest(f"{field}.processed.tensors", "is empty")
    return item
