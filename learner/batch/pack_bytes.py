"""Packs as bytes: rank 0 packs for every rank and sends each its own as one flat uint8 tensor.

The format is safetensors: names, dtypes and shapes are checked when it is read, and nothing is unpickled.
"""

from collections.abc import Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from learner.batch.packing import PackedBatch

_MEDIA = "media."


def encode_packs(packs: Sequence[PackedBatch]) -> Tensor:
    """The packs of one rank as uint8 `[num_bytes]`."""
    tensors: dict[str, Tensor] = {}
    for index, pack in enumerate(packs):
        named = pack.tensors() | {_MEDIA + name: value for name, value in pack.media.items()}
        tensors |= {f"{index}.{name}": value.contiguous() for name, value in named.items()}
    return torch.from_numpy(np.frombuffer(bytearray(save(tensors)), dtype=np.uint8))


def decode_packs(data: Tensor) -> list[PackedBatch]:
    """What `encode_packs` was given. Raises ValueError if `data` is not that."""
    try:
        tensors = load(data.numpy().tobytes())
    except SafetensorError as error:
        raise ValueError(f"not a list of packs: {error}") from error
    by_pack: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        by_pack.setdefault(int(index), {})[name] = value
    return [_pack(by_pack[index]) for index in range(len(by_pack))]


def _pack(named: dict[str, Tensor]) -> PackedBatch:
    media = {name.removeprefix(_MEDIA): value for name, value in named.items() if name.startswith(_MEDIA)}
    fields = {name: value for name, value in named.items() if not name.startswith(_MEDIA)}
    return PackedBatch(**fields, media=media)
