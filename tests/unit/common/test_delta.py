"""Deltas against the buffers that they lead between, bit by bit, and bytes that are no delta."""

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from common.delta import apply, encode


def buffer(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 40), st.data())
def test_a_delta_leads_to_the_new_buffer_bit_by_bit(word: int, num_words: int, data: st.DataObject) -> None:
    size = word * num_words
    old, new = (data.draw(st.binary(min_size=size, max_size=size)) for _ in range(2))
    base = buffer(old)
    apply(encode(buffer(old), buffer(new), word), base, word)
    assert bytes(base.tolist()) == new


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 1.0])
def test_a_bfloat16_buffer_of_which_a_share_changed(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(100_003, generator=generator).bfloat16()
    changed = torch.rand(old.shape, generator=generator) < share
    new = torch.where(changed, (old.float() * 1.01).bfloat16(), old)
    delta = encode(old.view(torch.uint8), new.view(torch.uint8), 2)
    result = old.clone()
    apply(delta, result.view(torch.uint8), 2)
    assert torch.equal(result.view(torch.int16), new.view(torch.int16))
    # One byte for where it changed, less than one for how, and the frame.
    assert delta.numel() <= 256 + 1.5 * int(changed.sum())


def test_the_format_by_hand() -> None:
    old, new = np.array([5, 5, 5, 300], "<u2"), np.array([5, 6, 5, 44], "<u2")
    delta = encode(buffer(old.tobytes()), buffer(new.tobytes()), 2)
    content = zstandard.ZstdDecompressor().decompress(bytes(delta.tolist()))
    # 2 words; 2 and 2 words on; +1 is 2 and -256 is 511 in zigzag: their low bytes, then their high bytes.
    assert content.hex(" ") == "02 00 00 00 00 00 00 00" + " 02 02" + " 00 00" * 3 + " 02 ff" + " 00 01"


def frame(content: bytes) -> torch.Tensor:
    return buffer(zstandard.ZstdCompressor().compress(content))


def count(number: int) -> bytes:
    return number.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (buffer(b""), "no zstd frame"),
        (buffer(b"not zstd at all"), "no zstd frame"),
        (frame(bytes(2**20)), "a frame of more than 32 bytes"),  # larger than any delta for this buffer
        (frame(b""), "0 bytes for 0 changed words"),
        (frame(count(1)), "8 bytes for 1 changed words"),
        (frame(count(2**63)), "for 9223372036854775808 changed words"),
        (frame(count(1) + b"\5\0\0\0" + b"\2\0"), "outside"),
        (frame(count(1) + b"\0\0\0\0" + b"\2\0"), "outside"),
        (frame(count(2) + b"\1\xff" + b"\0\xff" * 3 + b"\2\2\0\0"), "outside"),
    ],
)
def test_bytes_that_are_no_delta_change_nothing(delta: torch.Tensor, message: str) -> None:
    base = buffer(bytes(range(8)))
    with pytest.raises(ValueError, match=message):
        apply(delta, base, 2)
    assert bytes(base.tolist()) == bytes(range(8))


@given(st.binary(max_size=64))
def test_no_bytes_do_harm(data: bytes) -> None:
    base = buffer(bytes(64))
    try:
        apply(buffer(data), base, 4)
    except ValueError:
        assert not base.any()
