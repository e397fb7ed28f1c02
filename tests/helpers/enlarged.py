"""Random weights that are large enough for the outputs of a tiny model to differ."""

from typing import Any

import torch


def enlarge(model: Any) -> Any:
    """Random weights of standard deviation 0.02 give nearly uniform outputs; a factor makes mistakes visible."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "patch_embed" not in name:
                parameter.mul_(3.0)
            elif name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.2, 0.2, len(parameter)))
    return model
