"""Bounds on the pixels of one image or frame, as arguments of the model's own processor.

The learner and the actor both ask here, so that the same bounds give the same patches on both sides.
"""

from typing import Any

from common.errors import InvalidRequest, Unimplemented
from common.types import Modality


def resize_options(
    processor: Any, modality: Modality, min_pixels: int | None, max_pixels: int | None, field: str
) -> dict[str, Any]:
    """Arguments for one item; None leaves a bound to the model.

    Raises Unimplemented where the processor has no such bounds, and InvalidRequest for a bound beyond the model's other
    one; both name `field`.
    """
    if min_pixels is None and max_pixels is None:
        return {}
    of_modality = getattr(processor, f"{modality.value}_processor", None)
    known = getattr(getattr(of_modality, "valid_kwargs", None), "__annotations__", {})
    size: Any = getattr(of_modality, "size", {})
    bounded = all(edge in size for edge in ("shortest_edge", "longest_edge"))
    if not bounded or "min_pixels" not in known or "max_pixels" not in known:
        raise Unimplemented(
            field, "the processor of this model does not resize by a number of pixels; leave min_pixels, max_pixels out"
        )
    low = min_pixels if min_pixels is not None else size["shortest_edge"]
    high = max_pixels if max_pixels is not None else size["longest_edge"]
    if low > high:
        name = "max_pixels" if min_pixels is None else "min_pixels"
        raise InvalidRequest(f"{field}.{name}", f"makes the bounds {low} to {high} with the model's own")
    return {"size": {"shortest_edge": low, "longest_edge": high}}
