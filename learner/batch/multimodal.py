"""Joins the processed media of single samples into the keyword arguments of one forward call.

Where it stands: the processor yields one dict of tensors for each sample (`pixel_values`, `image_grid_thw`, ...);
packing picks the samples of a micro-batch; the model wants each name once.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IMAGE_BOUND = "image_bound"
"""MiniCPM's own code takes lists with one entry for each row and finds its images by this key."""

# Names whose dimensions after the first differ from sample to sample (audio frames, tiles of an image) and that come
# with a mask or a size of their own, so that zeros on the right are never looked at. The number is the fewest
# dimensions at which that is so: Qwen-VL's two-dimensional `pixel_values` are patches, and never ragged.
RAGGED_KEYS: Mapping[str, int] = {
    "input_features": 2,
    "input_features_mask": 2,
    "feature_attention_mask": 2,
    "input_audio_embeds": 2,
    "audio_attention_mask": 2,
    "pixel_values": 4,
    "pixel_attention_mask": 3,
    "aspect_ratio_mask": 2,
}

# Names whose samples lie end to end in the last dimension, if there is also a name that says where each image ends:
# transformers' MiniCPM-V takes `pixel_values` [1, 3, patch_size, sum of patches * patch_size].
_END_TO_END: Mapping[str, str] = {"pixel_values": "target_sizes"}


def extract_multi_modal_inputs(
    batch_data: Sequence[Mapping[str, Any] | None], indices: Sequence[int] | None = None
) -> dict[str, Tensor | list[Any]]:
    """Gather the processed media of many samples, by name.

    Args:
        batch_data: One mapping of names to tensors for each sample; `None`, `{}` or `None` values for text-only rows.
        indices: The samples to take, in this order, repeats allowed. `None` takes all.

    Returns:
        For each name the tensors of all samples that have it, concatenated on dimension 0; `{}` if no sample has any.
        (`pixel_values` that come with `target_sizes`: on the last.)
        If any chosen row has `image_bound`, every name maps to a list with one entry for each chosen row that has it.

    Raises:
        IndexError: an index is outside the batch.
        ValueError: tensors of one name do not fit together; the message has the name and the shapes.

    Example: two samples with one image each of a 4 x 4 grid give `pixel_values` [32, 1176], `image_grid_thw` [2, 3].
    """
    rows = [row for row in _select(batch_data, indices) if row]
    collected: dict[str, list[Any]] = {}
    for row in rows:
        for key, value in row.items():
            if value is not None:
                collected.setdefault(key, []).append(value)
    if any(IMAGE_BOUND in row for row in rows):
        return dict(collected)
    return {
        key: _concatenate(key, values) if key not in _end_to_end(collected) else _line_up(key, values)
        for key, values in collected.items()
    }


def _end_to_end(keys: Container[str]) -> set[str]:
    return {key for key, companion in _END_TO_END.items() if key in keys and companion in keys}


def _select(
    batch_data: Sequence[Mapping[str, Any] | None], indices: Sequence[int] | None
) -> list[Mapping[str, Any] | None]:
    if indices is None:
        return list(batch_data)
    for index in indices:
        if not 0 <= index < len(batch_data):
            raise IndexError(f"index {index} is outside a batch of {len(batch_data)} samples")
    return [batch_data[index] for index in indices]


def _concatenate(key: str, values: list[Any]) -> Tensor:
    for value in values:
        if not isinstance(value, Tensor):
            raise ValueError(f"{key}: expected a tensor for each sample, found {type(value).__name__}")
    shapes = [tuple(value.shape) for value in values]
    dtypes = {value.dtype for value in values}
    if len({len(shape) for shape in shapes}) > 1 or not shapes[0] or len(dtypes) > 1:
        raise ValueError(f"{key}: cannot be concatenated, shapes {shapes}, dtypes {sorted(map(str, dtypes))}")
    if len({shape[1:] for shape in shapes}) > 1:
        if key not in RAGGED_KEYS or len(shapes[0]) < RAGGED_KEYS[key]:
            raise ValueError(f"{key}: cannot be concatenated on dimension 0, shapes {shapes}")
        values = _pad_right(values)
    return torch.cat(values, dim=0)


def _line_up(key: str, values: list[Any]) -> Tensor:
    if any(not isinstance(value, Tensor) or value.ndim < 2 or len(value) != 1 for value in values):
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values]
        raise ValueError(f"{key}: expected one line of patches for each sample, found {shapes}")
    if len({(value.shape[:-1], value.dtype) for value in values}) > 1:
        raise ValueError(
            f"{key}: cannot be concatenated on the last dimension, shapes {[tuple(value.shape) for value in values]}, "
            f"dtypes {sorted({str(value.dtype) for value in values})}"
        )
    return torch.cat(values, dim=-1)


def _pad_right(values: list[Tensor]) -> list[Tensor]:
    """Zeros on the right of every dimension but the first, up to the largest."""
    largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [large - size for large, size in zip(largest, value.shape[1:], strict=True)]
        # F.pad counts dimensions from the last, two numbers (left, right) for each.
        pads = [number for gap in reversed(missing) for number in (0, gap)]
        padded.append(torch.nn.functional.pad(value, pads))
    return padded
