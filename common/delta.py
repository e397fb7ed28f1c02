"""What changed in a buffer since another version of it, bit by bit: fewer bytes where most elements stay as they are.

At the learning rates of reinforcement learning most steps of a weight are smaller than half a bfloat16 apart, and are
rounded away. A delta is one zstd frame (RFC 8878) of, all little-endian,

    number of changed words     8 bytes
    distances between them      4 bytes each: words since the one before, the first from the word before the buffer
    differences                 a word each: new - old, modulo 2 to the word's bits, zigzag (0, -1, 1 as 0, 1, 2)

each of the last two as byte planes (first the low bytes of all, then the next): most planes are zeros.
"""

import numpy as np
import numpy.typing as npt
import torch
import zstandard

_LEVEL = 1
_COUNT_BYTES = 8
_GAP_BYTES = 4
WORDS: dict[int, npt.DTypeLike] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def encode(old: torch.Tensor, new: torch.Tensor, word_bytes: int) -> torch.Tensor:
    """The delta from `old` to `new`, two uint8 buffers of one length, a multiple of `word_bytes` (1, 2, 4 or 8)."""
    old_words, new_words = _words(old, word_bytes), _words(new, word_bytes)
    places = np.flatnonzero(old_words != new_words)
    gaps = np.diff(places, prepend=-1).astype("<u4")
    difference = new_words[places] - old_words[places]
    one, top = old_words.dtype.type(1), old_words.dtype.type(8 * word_bytes - 1)
    zigzag = (difference << one) ^ (np.zeros_like(difference) - (difference >> top))
    content = np.uint64(len(places)).tobytes() + _planes(gaps) + _planes(zigzag)
    return torch.frombuffer(bytearray(zstandard.ZstdCompressor(level=_LEVEL).compress(content)), dtype=torch.uint8)


def apply(delta: torch.Tensor, base: torch.Tensor, word_bytes: int) -> None:
    """Turn `base` into the buffer that the delta leads to, in place.

    Raises:
        ValueError: it is no delta for a buffer of this length; `base` is then as it was.
    """
    words = _words(base, word_bytes)
    limit = _COUNT_BYTES + len(words) * (_GAP_BYTES + word_bytes)
    frame = delta.numpy().tobytes()
    try:
        if zstandard.frame_content_size(frame) > limit:
            raise ValueError(f"a frame of more than {limit} bytes")
        content = zstandard.ZstdDecompressor().decompress(frame, max_output_size=limit)
    except zstandard.ZstdError as error:
        raise ValueError(f"no zstd frame of at most {limit} bytes: {error}") from error
    count = int.from_bytes(content[:_COUNT_BYTES], "little")
    if len(content) != _COUNT_BYTES + count * (_GAP_BYTES + word_bytes):
        raise ValueError(f"{len(content)} bytes for {count} changed words")
    end = _COUNT_BYTES + count * _GAP_BYTES
    gaps = _from_planes(content[_COUNT_BYTES:end], np.dtype("<u4"))
    zigzag = _from_planes(content[end:], words.dtype)
    places = np.cumsum(gaps, dtype=np.int64) - 1
    if count and (gaps.min() == 0 or places[-1] >= len(words)):
        raise ValueError("a changed word lies outside the buffer")
    one = words.dtype.type(1)
    words[places] += (zigzag >> one) ^ (np.zeros_like(zigzag) - (zigzag & one))


def _words(buffer: torch.Tensor, word_bytes: int) -> npt.NDArray[np.unsignedinteger]:
    words: npt.NDArray[np.unsignedinteger] = buffer.numpy().view(WORDS[word_bytes])
    return words


def _planes(values: npt.NDArray[np.unsignedinteger]) -> bytes:
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _from_planes(content: bytes, dtype: "np.dtype[np.unsignedinteger]") -> npt.NDArray[np.unsignedinteger]:
    planes = np.frombuffer(content, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(-1)
