"""Tensors that somebody else's processor made of one image, held against what the model's own processor yields.

A shape that the model does not expect fails in the middle of a batch, inside the engine, and takes every request along:
so all that can be known is checked here.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from common.dtypes import TORCH_DTYPES
from common.errors import InvalidRequest, Unimplemented
from common.tensors import NamedTensor

_GRID = "image_grid_thw"
_PIXELS = "pixel_values"


def foreign_item(processor: Any, tensors: Sequence[NamedTensor], stand_in: Image.Image, field: str) -> Any:
    """vLLM's `MultiModalKwargsItems` of one image; `stand_in` is any image, to see what the processor yields.

    Models whose processor yields patches and their grid (`pixel_values`, `image_grid_thw`: the Qwen-VL families) are
    served. Raises Unimplemented for others, and InvalidRequest.
    """
    from transformers.feature_extraction_utils import BatchFeature
    from vllm.multimodal.inputs import MultiModalKwargsItems

    model = processor._apply_hf_processor_main(processor.info.parse_mm_data({"image": [stand_in]}), {})
    fields = processor._get_mm_fields_config(model, {})
    expected = {name: model[name] for name in fields if name in model}
    if set(expected) != {_PIXELS, _GRID}:
        raise Unimplemented(
            field, f"this model's processor yields {sorted(expected)}; only patches with a grid are taken"
        )
    values = {}
    paths = {named.name: f"{field}[{i}]" for i, named in enumerate(tensors)}
    for name in expected:
        if name not in paths:
            raise InvalidRequest(field, f"{name} is missing; the processor yields {sorted(expected)}")
    for named in tensors:
        values[named.name] = _checked(named, expected.get(named.name), paths[named.name])
    merge = processor.info.get_hf_config().vision_config.spatial_merge_size
    _check_grid(values[_GRID], values[_PIXELS], merge, paths)
    inputs = BatchFeature(values)
    return MultiModalKwargsItems.from_hf_inputs(inputs, processor._get_mm_fields_config(inputs, {}))


def _checked(named: NamedTensor, model: torch.Tensor | None, path: str) -> torch.Tensor:
    """As a torch tensor; floats in the model's own float type, as vLLM casts those of its own processor."""
    if model is None:
        raise InvalidRequest(f"{path}.name", f"{named.name} is not what the processor of this model yields")
    tensor = named.tensor
    dtype = TORCH_DTYPES[tensor.dtype]
    if dtype != model.dtype and not (dtype.is_floating_point and model.dtype.is_floating_point):
        raise InvalidRequest(
            f"{path}.tensor.dtype",
            f"is {dtype}; this server's processor yields {model.dtype}"
            + (" (its setting normalize_on_device is on)" if model.dtype is torch.uint8 else ""),
        )
    if len(tensor.shape) != model.ndim or tensor.shape[1:] != tuple(model.shape[1:]) or 0 in tensor.shape:
        shape = ", ".join(map(str, model.shape[1:]))
        raise InvalidRequest(f"{path}.tensor.shape", f"is {list(tensor.shape)}; must be [n, {shape}]")
    values = torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)
    return values.to(model.dtype)


def _check_grid(grids: torch.Tensor, pixels: torch.Tensor, merge: int, paths: dict[str, str]) -> None:
    grid = grids.flatten().tolist()
    if len(grid) != 3:
        raise InvalidRequest(f"{paths[_GRID]}.tensor.shape", f"is {list(grids.shape)}; must be [1, 3]: one image")
    if grid[0] != 1 or min(grid) < 1 or grid[1] % merge or grid[2] % merge:
        raise InvalidRequest(
            f"{paths[_GRID]}.tensor.data", f"is {grid}; must be 1 and two positive multiples of {merge}"
        )
    if len(pixels) != math.prod(grid):
        raise InvalidRequest(
            f"{paths[_PIXELS]}.tensor.shape", f"{len(pixels)} patches; the grid {grid} has {math.prod(grid)}"
        )
