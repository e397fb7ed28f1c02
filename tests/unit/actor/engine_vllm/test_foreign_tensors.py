"""Grids of processed tensors, without a model."""

import pytest
import torch

from actor.engine_vllm.foreign_tensors import _check_grid
from common.errors import InvalidRequest
from common.types import Modality


@pytest.mark.parametrize("grid", [[1, 2, 8192], [1, 8192, 2]])
def test_the_longest_side(grid: list[int]) -> None:
    _check_grid(torch.tensor([grid]), "t[1]", 2, Modality.IMAGE)


@pytest.mark.parametrize(("grid", "modality"), [([1, 2, 8194], Modality.IMAGE), ([3, 8194, 2], Modality.VIDEO)])
def test_a_side_that_vision_towers_have_no_positions_for(grid: list[int], modality: Modality) -> None:
    """The engine would die of it."""
    with pytest.raises(InvalidRequest) as refused:
        _check_grid(torch.tensor([grid]), "media[0].processed.tensors[1]", 2, modality)
    assert str(refused.value) == (
        f"media[0].processed.tensors[1].tensor.data: is {grid}; the vision tower has positions for 8192 patches a side"
    )


def test_a_long_video_is_none() -> None:
    _check_grid(torch.tensor([[10_000, 2, 2]]), "t[1]", 2, Modality.VIDEO)
