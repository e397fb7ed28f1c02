"""Images as bytes: their name (sha256), and a decoder that looks at the header before it allocates anything.

The learner and the actor both decode with `decode_image`, so that the same bytes are the same pixels on both sides.
"""

import hashlib
import io
from dataclasses import dataclass

from PIL import Image

from common.errors import InvalidRequest, TooLarge

FORMATS = ("PNG", "JPEG", "WEBP")
# Eight bits per channel or less: what converts to RGB without losing range.
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header of an image file says."""

    format: str
    width: int
    height: int


def content_hash(data: bytes) -> bytes:
    """The 32-byte sha256 that names a media item everywhere."""
    return hashlib.sha256(data).digest()


def check_image(data: bytes, field: str, max_pixels: int) -> ImageHeader:
    """Read the header of an image file; no pixel is decoded.

    Raises InvalidRequest (not a still PNG, JPEG or WebP of 8 bits per channel) or TooLarge, both naming `field`.
    """
    with _open(data, field, max_pixels) as image:
        return ImageHeader(image.format or "", image.width, image.height)


def decode_image(data: bytes, field: str, max_pixels: int) -> Image.Image:
    """Decode an image file to RGB. Blocking, and up to `3 * max_pixels` bytes: call it off the event loop.

    Raises as `check_image`, and InvalidRequest for a file that ends early or is damaged.
    """
    with _open(data, field, max_pixels) as image:
        try:
            return image.convert("RGB")
        except Exception as error:  # decoders raise whatever they like on hostile bytes
            raise InvalidRequest(field, f"damaged {image.format} file: {type(error).__name__}") from error


def _open(data: bytes, field: str, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooLarge(field, f"the image has more than {max_pixels} pixels") from None
    except Exception as error:  # as above
        raise InvalidRequest(field, "not an image in PNG, JPEG or WebP format") from error
    if image.width * image.height > max_pixels:
        raise TooLarge(field, f"{image.width}x{image.height} pixels, more than the limit of {max_pixels}")
    if getattr(image, "n_frames", 1) != 1:
        raise InvalidRequest(field, "an animation; send its frames as single images")
    if image.mode not in _MODES:
        raise InvalidRequest(field, f"pixels of mode {image.mode}; convert the image to 8 bits per channel")
    return image
