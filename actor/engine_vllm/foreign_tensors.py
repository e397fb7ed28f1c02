"""Tensors that somebody else's processor made of an image or video, held against what the model's own yields.

A shape that the model does not expect fails in the middle of a batch, inside the engine, and takes every request along:
so all that can be known is checked here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from actor.engine import EngineMedia, VideoArray
from actor.engine_vllm.videos import vllm_item
from common.dtypes import TORCH_DTYPES
from common.errors import InvalidRequest, Unimplemented
from common.tensors import NamedTensor
from common.types import Modality

_PIXELS = {Modality.IMAGE: "pixel_values", Modality.VIDEO: "pixel_values_videos"}
GRIDS = {Modality.IMAGE: "image_grid_thw", Modality.VIDEO: "video_grid_thw"}
_SECONDS = "second_per_grid_ts"
# Rows of the table of rotary positions in vLLM's vision towers.
_MAX_SIDE = 8192
_STAND_INS: dict[Modality, Image.Image | VideoArray] = {
    Modality.IMAGE: Image.new("RGB", (64, 64), "gray"),
    Modality.VIDEO: np.full((4, 64, 64, 3), 128, np.uint8),
}


def stand_in(modality: Modality) -> Any:
    """Any image or video, in vLLM's form, to see what the processor yields."""
    return vllm_item(EngineMedia(bytes(32), _STAND_INS[modality], modality=modality, frames_per_second=1.0))


def yielded(processor: Any, modality: Modality) -> dict[str, Any]:
    """What the model's own processor makes of any image or video, by name: tensors, or what they can be made of."""
    model = processor._apply_hf_processor_main(processor.info.parse_mm_data({modality.value: [stand_in(modality)]}), {})
    fields = processor._get_mm_fields_config(model, {})
    return {name: model[name] for name in fields if name in model}


def foreign_item(
    processor: Any, expected: Mapping[str, Any], tensors: Sequence[NamedTensor], modality: Modality, field: str
) -> Any:
    """vLLM's `MultiModalKwargsItems` of one image or video; `expected` is what its own processor has `yielded`.

    Models whose processor yields patches and their grid (`pixel_values`, `image_grid_thw`: the Qwen-VL families, of
    whose videos Qwen3-VL's come with texts and so are not among them) are served. Raises Unimplemented for others, and
    InvalidRequest.
    """
    from transformers.feature_extraction_utils import BatchFeature
    from vllm.multimodal.inputs import MultiModalKwargsItems

    pixels, grid = _PIXELS[modality], GRIDS[modality]
    if set(expected) - {_SECONDS} != {pixels, grid}:
        raise Unimplemented(
            field, f"this model's processor yields {sorted(expected)}; only patches with a grid are taken"
        )
    values = {}
    paths = {named.name: f"{field}[{i}]" for i, named in enumerate(tensors)}
    for name in expected:
        if name not in paths:
            raise InvalidRequest(field, f"{name} is missing; the processor yields {sorted(expected)}")
    for named in tensors:
        model_tensor = torch.as_tensor(expected[named.name]) if named.name in expected else None
        values[named.name] = _checked(named, model_tensor, paths[named.name])
    merge = processor.info.get_hf_config().vision_config.spatial_merge_size
    _check_grid(values[grid], paths[grid], merge, modality)
    num_patches = math.prod(values[grid].flatten().tolist())
    if len(values[pixels]) != num_patches:
        raise InvalidRequest(
            f"{paths[pixels]}.tensor.shape",
            f"{len(values[pixels])} patches; the grid {values[grid].flatten().tolist()} has {num_patches}",
        )
    if _SECONDS in values and (values[_SECONDS].numel() != 1 or values[_SECONDS].item() <= 0):
        raise InvalidRequest(f"{paths[_SECONDS]}.tensor.data", "must be one positive number")
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
        shape = ", ".join(["n", *map(str, model.shape[1:])])
        raise InvalidRequest(f"{path}.tensor.shape", f"is {list(tensor.shape)}; must be [{shape}]")
    values = torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)
    return values.to(model.dtype)


def _check_grid(grids: torch.Tensor, path: str, merge: int, modality: Modality) -> None:
    grid = grids.flatten().tolist()
    if len(grid) != 3:
        raise InvalidRequest(f"{path}.tensor.shape", f"is {list(grids.shape)}; must be [1, 3]: one {modality.value}")
    first = "1" if modality is Modality.IMAGE else "a positive number"
    if (modality is Modality.IMAGE and grid[0] != 1) or min(grid) < 1 or grid[1] % merge or grid[2] % merge:
        raise InvalidRequest(f"{path}.tensor.data", f"is {grid}; must be {first} and two positive multiples of {merge}")
    if max(grid[1:]) > _MAX_SIDE:
        raise InvalidRequest(
            f"{path}.tensor.data", f"is {grid}; the vision tower has positions for {_MAX_SIDE} patches a side"
        )
