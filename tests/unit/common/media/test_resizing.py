"""Bounds on pixels, where a processor has none or others."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.image_utils import SizeDict

from common.errors import InvalidRequest, Unimplemented
from common.media.resizing import resize_options
from common.types import Modality


class _Bounded:
    min_pixels: int
    max_pixels: int


def _processor(size: Any, valid_kwargs: type = _Bounded) -> Any:
    return SimpleNamespace(image_processor=SimpleNamespace(valid_kwargs=valid_kwargs, size=size))


def test_a_bound_that_is_left_out_is_the_models_own() -> None:
    for size in ({"shortest_edge": 4, "longest_edge": 9}, SizeDict(shortest_edge=4, longest_edge=9)):
        options = resize_options(_processor(size), Modality.IMAGE, None, 8, "x")
        assert options == {"size": {"shortest_edge": 4, "longest_edge": 8}}


@pytest.mark.parametrize("size", [{"height": 4, "width": 9}, {"shortest_edge": 4}, SizeDict(height=4, width=9)])
def test_a_processor_whose_size_is_no_number_of_pixels_says_so(size: Any) -> None:
    for bounds in ((None, 8), (8, None), (1, 8)):
        with pytest.raises(Unimplemented, match=r"^x: the processor of this model does not resize by a number of pix"):
            resize_options(_processor(size), Modality.IMAGE, *bounds, "x")


@pytest.mark.parametrize("bound", [None, "min_pixels", "max_pixels"])
def test_edges_that_are_lengths_are_no_numbers_of_pixels(bound: str | None) -> None:
    """Processors whose edges are lengths have the same two keys; those that count pixels take both bounds by name."""
    takes = type("_Takes", (), {"__annotations__": {bound: int} if bound else {}})
    with pytest.raises(Unimplemented):
        resize_options(_processor({"shortest_edge": 4, "longest_edge": 9}, takes), Modality.IMAGE, 5, 8, "x")


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((None, 3), "x.max_pixels: makes the bounds 4 to 3 with the model's own"),
        ((10, None), "x.min_pixels: makes the bounds 10 to 9 with the model's own"),
    ],
)
def test_a_bound_beyond_the_models_other_one_is_named(bounds: tuple[int | None, int | None], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        resize_options(_processor({"shortest_edge": 4, "longest_edge": 9}), Modality.IMAGE, *bounds, "x")
