"""Names of tensor types, as in safetensors files, and torch's own; the tensors that they describe in flat memory."""

import math

import torch

from common.types import ManifestParameter

TORCH_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def tensor_in(bucket: torch.Tensor, parameter: ManifestParameter) -> torch.Tensor:
    """A parameter as a view on its bucket, flat uint8 memory of any device."""
    dtype = TORCH_DTYPES[parameter.dtype]
    num_bytes = math.prod(parameter.shape) * dtype.itemsize
    return bucket[parameter.offset : parameter.offset + num_bytes].view(dtype).view(parameter.shape)
