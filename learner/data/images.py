"""An image of a row to a file that actors decode, from its bytes, a path, a data URL or a PIL image."""

import base64
import errno
import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from common.config import ConfigError, NotYet

# What is wrong with a path as it is written; with any other error the disk may do better the next time.
_WRONG_PATH = frozenset(
    {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
)
# Pillow starts Ghostscript for it.
_STARTS_A_PROGRAM = "EPS"
_LONGEST_NAME = 200


def image_file(value: object, base_dir: Path) -> bytes:
    """The file of an image: PNG, JPEG and WebP as they are, all else as a PNG of what a viewer shows.

    Raises what the row is to be blamed for as ConfigError, and NotYet where the disk may do better the next time; the
    message goes on after "image 0".
    """
    if isinstance(value, Image.Image):
        return _as_png(value)
    if isinstance(value, str):
        value = _from_url(value) if value.startswith("data:") else _from_path(value, base_dir)
    if not isinstance(value, bytes):
        raise ConfigError(f"is a {type(value).__name__}; give file bytes, a path, or a PIL image")
    from common.media import FORMATS, JPEG_AND_MORE

    try:
        with Image.open(io.BytesIO(value), formats=_formats()) as image:
            return value if image.format in (*FORMATS, JPEG_AND_MORE) else _as_png(image)
    except (ConfigError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ConfigError("cannot be read: no format of images that is known here") from None
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        raise ConfigError(f"cannot be read: {error}") from error


def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.OPEN if name != _STARTS_A_PROGRAM]


def _from_url(url: str) -> bytes:
    kind, _, content = url.partition(",")
    try:
        if not kind.endswith(";base64"):
            raise ValueError
        return base64.b64decode(content, validate=True)
    except ValueError:
        raise ConfigError(f"is a data URL without proper base64: {_short(url)}") from None


def _from_path(name: str, base_dir: Path) -> bytes:
    if name.startswith(("http://", "https://")):
        raise ConfigError(f"is {_short(name)}; no URL is fetched: download the images, and name their files")
    path = base_dir / name.removeprefix("file://")
    try:
        return path.read_bytes()
    except OSError as error:
        kind = ConfigError if error.errno in _WRONG_PATH else NotYet
        raise kind(f"is the file {_short(str(path))}: {error.strerror}") from None
    except ValueError as error:  # a path that no file system has
        raise ConfigError(f"is the file {_short(str(path))!r}: {error}") from None


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."


def _as_png(image: Image.Image) -> bytes:
    from common.media import as_shown

    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would cut off what is above 255
        raise ConfigError(f"has pixels of mode {image.mode}; convert it to 8 bits per channel")
    file = io.BytesIO()
    as_shown(image).save(file, format="PNG")
    return file.getvalue()
