"""Images and videos, on their way to an actor."""

import enum
from dataclasses import dataclass, replace

from common.tensors import NamedTensor, Tensor


class Modality(enum.Enum):
    """What a media item is."""

    IMAGE = "image"
    VIDEO = "video"


@dataclass(frozen=True, slots=True)
class PlaceholderRange:
    """The run of tokens `[offset, offset + length)` of the expanded prompt that one media item fills."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of a video in order, each an image file of the same width and height."""

    files: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One image or video of a prompt: its sha256 (32 bytes), and its content unless the receiver has that already.

    The content of an image is one of: an encoded file; pixels, `U8 [height, width, 3]`; or what the model's own
    processor yields for it, by name. That of a video: its frames; pixels, `U8 [frames, height, width, 3]`; or processed
    tensors likewise. `common.media` and `common.tensors` have the hashes. `min_pixels` and `max_pixels` bound
    height * width after the processor's resizing; None: the model's own bounds. `frames_per_second` says how far apart
    the frames of a video are.
    """

    sha256: bytes
    encoded: bytes | None = None
    modality: Modality = Modality.IMAGE
    pixels: Tensor | None = None
    processed: tuple[NamedTensor, ...] = ()
    min_pixels: int | None = None
    max_pixels: int | None = None
    frames: Frames | None = None
    frames_per_second: float | None = None

    @property
    def content(self) -> "MediaContent | None":
        """The one content that is here, None for a reference by hash."""
        if self.encoded is not None:
            return self.encoded
        return self.frames or self.pixels or self.processed or None

    def by_hash(self) -> "MediaItem":
        """The same item without its content, for a receiver that has it."""
        return replace(self, encoded=None, pixels=None, processed=(), frames=None)


MediaContent = bytes | Frames | Tensor | tuple[NamedTensor, ...]
