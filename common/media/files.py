"""Images and videos as bytes: their name (sha256), and a decoder that looks at headers before it allocates anything.

The learner and the actor both decode with `decode_image`, so that the same bytes are the same pixels on both sides: an
image as a viewer shows it, upright and with white behind what is transparent.
"""

import contextlib
import hashlib
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from common.errors import InvalidRequest, TooLarge
from common.media.headers import check_parts
from common.tensors import Tensor, pixels_hash, tensors_hash
from common.types import Frames, MediaContent

FORMATS = ("PNG", "JPEG", "WEBP")
# A JPEG file with more pictures behind the one that is meant, as phones make them: its gain map, the second eye.
JPEG_AND_MORE = "MPO"
# Eight bits per channel or less: what converts to RGB without losing range.
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header of an image file says; its EXIF data may yet turn it by a quarter."""

    format: str
    width: int
    height: int


def content_hash(data: bytes) -> bytes:
    """The 32-byte sha256 that names a media item everywhere."""
    return hashlib.sha256(data).digest()


def frames_hash(frames: Frames) -> bytes:
    """The same of the frames of a video; `MediaItem.sha256` in the proto file defines it."""
    digest = hashlib.sha256(f"frames {len(frames.files)}\n".encode())
    for file in frames.files:
        digest.update(content_hash(file))
    return digest.digest()


def media_hash(content: MediaContent) -> bytes:
    """The 32-byte sha256 of whatever a media item holds."""
    if isinstance(content, bytes):
        return content_hash(content)
    if isinstance(content, Frames):
        return frames_hash(content)
    return pixels_hash(content) if isinstance(content, Tensor) else tensors_hash(content)


def check_image(data: bytes, field: str, max_pixels: int) -> ImageHeader:
    """Read the header of an image file; no pixel is decoded.

    Raises InvalidRequest (not a still PNG, JPEG or WebP of 8 bits per channel) or TooLarge, both naming `field`.
    """
    with _open(data, field, max_pixels) as image:
        return ImageHeader(image.format or "", image.width, image.height)


def decode_image(data: bytes, field: str, max_pixels: int) -> Image.Image:
    """Decode an image file as `as_shown`. Blocking, and up to `16 * max_pixels` bytes: call it off the event loop.

    Raises as `check_image`, and InvalidRequest for a file that ends early or is damaged.
    """
    with _open(data, field, max_pixels) as image:
        try:
            return as_shown(image)
        except Exception as error:  # decoders raise whatever they like on hostile bytes
            raise InvalidRequest(field, f"damaged {image.format} file: {type(error).__name__}") from error


def as_shown(image: Image.Image) -> Image.Image:
    """The image in RGB as a viewer shows it: turned as its EXIF data say, on white where it is transparent.

    As vLLM's own server does it. Raises what Pillow raises for damaged pixels; EXIF data that are damaged say nothing.
    `image` itself is turned too.
    """
    image.load()
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if not image.has_transparency_data:
        # A copy even of RGB: an opened image holds on to its file, a WebP to a decoder with two canvases.
        return image.convert("RGB")
    ink = image.convert("RGBA")
    shown = Image.new("RGB", ink.size, "white")
    shown.paste(ink, mask=ink)
    return shown


def check_frames(frames: Frames, field: str, max_frames: int, max_pixels: int) -> ImageHeader:
    """Read the headers of all frames; that of the first one. `max_pixels` are those of all frames together.

    Raises as `check_image`, naming the file, and for frames that are none, too many or of different sizes.
    """
    if not frames.files:
        raise InvalidRequest(f"{field}.files", "is empty")
    if len(frames.files) > max_frames:
        raise TooLarge(f"{field}.files", f"{len(frames.files)} frames, more than the limit of {max_frames}")
    first = check_image(frames.files[0], f"{field}.files[0]", max_pixels)
    if len(frames.files) * first.width * first.height > max_pixels:
        raise TooLarge(
            f"{field}.files",
            f"{len(frames.files)} frames of {first.width}x{first.height} pixels, more than the limit of {max_pixels}",
        )
    for i, file in enumerate(frames.files[1:], start=1):
        header = check_image(file, f"{field}.files[{i}]", max_pixels)
        if (header.width, header.height) != (first.width, first.height):
            raise InvalidRequest(
                f"{field}.files[{i}]",
                f"{header.width}x{header.height} pixels; the first frame has {first.width}x{first.height}",
            )
    return first


def decode_frames(frames: Frames, field: str, max_frames: int, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Decode a video to RGB, `[frames, height, width, 3]`; as `decode_image` otherwise. Raises as `check_frames`."""
    check_frames(frames, field, max_frames, max_pixels)
    first = decode_image(frames.files[0], f"{field}.files[0]", max_pixels)
    video = np.empty((len(frames.files), first.height, first.width, 3), np.uint8)
    video[0] = np.asarray(first)
    for i, file in enumerate(frames.files[1:], start=1):
        frame = decode_image(file, f"{field}.files[{i}]", max_pixels)
        if frame.size != first.size:
            raise InvalidRequest(
                f"{field}.files[{i}]",
                f"{frame.width}x{frame.height} pixels when it is upright; "
                f"the first frame has {first.width}x{first.height}",
            )
        video[i] = np.asarray(frame)
    return video


def _open(data: bytes, field: str, max_pixels: int) -> Image.Image:
    check_parts(data, field)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooLarge(field, f"the image has more than {max_pixels} pixels") from None
    except Exception as error:  # as above
        raise InvalidRequest(field, "not an image in PNG, JPEG or WebP format") from error
    if image.width * image.height > max_pixels:
        raise TooLarge(field, f"{image.width}x{image.height} pixels, more than the limit of {max_pixels}")
    if getattr(image, "n_frames", 1) != 1 and image.format != JPEG_AND_MORE:
        raise InvalidRequest(field, "an animation; send its frames as single images")
    if image.mode not in _MODES:
        raise InvalidRequest(field, f"pixels of mode {image.mode}; convert the image to 8 bits per channel")
    return image
