"""Images and videos as bytes: their names, bounds and pixels."""

from common.media.files import (
    FORMATS,
    JPEG_AND_MORE,
    ImageHeader,
    as_shown,
    check_frames,
    check_image,
    content_hash,
    decode_frames,
    decode_image,
    frames_hash,
    media_hash,
)

__all__ = [
    "FORMATS",
    "JPEG_AND_MORE",
    "ImageHeader",
    "as_shown",
    "check_frames",
    "check_image",
    "content_hash",
    "decode_frames",
    "decode_image",
    "frames_hash",
    "media_hash",
]
