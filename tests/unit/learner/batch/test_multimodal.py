from typing import Any

import pytest
import torch

from learner.batch.multimodal import extract_multi_modal_inputs


def image(value: float, patches: int = 4) -> dict[str, Any]:
    return {"pixel_values": torch.full((patches, 3), value), "image_grid_thw": torch.tensor([[1, 2, patches // 2]])}


def test_concatenates_each_name_and_skips_text_only_rows() -> None:
    joined = extract_multi_modal_inputs([image(1), None, {}, image(2, 6), {"pixel_values": None}])
    pixels = joined["pixel_values"]
    assert isinstance(pixels, torch.Tensor)
    assert pixels[:, 0].tolist() == [1.0] * 4 + [2.0] * 6
    assert joined["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 3]]  # type: ignore[union-attr]


@pytest.mark.parametrize("batch", [[], [None, {}], [{"pixel_values": None}]])
def test_nothing_gives_nothing(batch: list[Any]) -> None:
    assert extract_multi_modal_inputs(batch) == {}


def test_indices_are_taken_in_the_callers_order_with_repeats() -> None:
    batch = [image(0), None, image(2), image(3)]
    joined = extract_multi_modal_inputs(batch, [3, 1, 0, 3])
    assert joined["pixel_values"][::4, 0].tolist() == [3.0, 0.0, 3.0]  # type: ignore[call-overload]
    assert extract_multi_modal_inputs(batch, []) == {}
    assert extract_multi_modal_inputs(batch, [1]) == {}


@pytest.mark.parametrize("index", [4, -1])
def test_an_index_outside_the_batch_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match=rf"index {index} is outside a batch of 2 samples"):
        extract_multi_modal_inputs([image(0), image(1)], [0, index])


def test_image_bound_in_any_chosen_row_gives_lists_for_every_name() -> None:
    bound = {"image_bound": torch.tensor([[1, 5]]), "pixel_values": [torch.zeros(3, 14, 70)]}
    other = {"pixel_values": [torch.zeros(3, 14, 28)]}
    joined = extract_multi_modal_inputs([bound, None, other])
    assert joined == {
        "image_bound": [bound["image_bound"]],
        "pixel_values": [bound["pixel_values"], other["pixel_values"]],
    }
    # The row with image_bound is not chosen: concatenation again.
    assert isinstance(extract_multi_modal_inputs([bound, image(1)], [1])["pixel_values"], torch.Tensor)


def test_known_ragged_names_are_padded_on_the_right() -> None:
    joined = extract_multi_modal_inputs(
        [{"input_features": torch.ones(1, 2, 3)}, {"input_features": torch.full((2, 2, 5), 2.0)}]
    )["input_features"]
    assert joined.tolist() == [[[1, 1, 1, 0, 0]] * 2, [[2] * 5] * 2, [[2] * 5] * 2]  # type: ignore[union-attr]
    tiles = extract_multi_modal_inputs(
        [{"pixel_values": torch.ones(1, 1, 3, 2, 2)}, {"pixel_values": torch.ones(1, 4, 3, 2, 2)}]
    )
    assert tuple(tiles["pixel_values"].shape) == (2, 4, 3, 2, 2)  # type: ignore[union-attr]
    assert float(tiles["pixel_values"].sum()) == 12 + 48  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        (torch.ones(4, 3), torch.ones(4, 5), r"pixel_values: .*\(4, 3\), \(4, 5\)"),
        (torch.ones(4, 3), torch.ones(4), r"pixel_values: .*\(4, 3\), \(4,\)"),
        (torch.ones(2), torch.tensor(1.0), r"pixel_values: .*\(2,\), \(\)"),
        (torch.ones(4, 3), torch.ones(4, 3).half(), r"pixel_values: .*float16.*float32"),
        (torch.ones(4, 3), [1, 2], "pixel_values: expected a tensor for each sample, found list"),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_shapes(first: Any, second: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        extract_multi_modal_inputs([{"pixel_values": first}, {"pixel_values": second}])


LINES: list[Any] = [
    {"pixel_values": torch.full((1, 3, 2, 8), 1.0), "target_sizes": torch.tensor([[2, 2]])},
    None,
    {"pixel_values": torch.full((1, 3, 2, 20), 2.0), "target_sizes": torch.tensor([[2, 2], [2, 3]])},
]


def test_lines_of_patches_are_laid_end_to_end() -> None:
    joined = extract_multi_modal_inputs(LINES)
    assert isinstance(joined["pixel_values"], torch.Tensor)
    assert joined["pixel_values"][0, 0, 0].tolist() == [1.0] * 8 + [2.0] * 20
    assert joined["pixel_values"].shape == (1, 3, 2, 28)
    assert isinstance(joined["target_sizes"], torch.Tensor)
    assert joined["target_sizes"].tolist() == [[2, 2], [2, 2], [2, 3]]
    with pytest.raises(ValueError, match=r"pixel_values: expected one line .*\(2, 3, 2, 8\)"):
        extract_multi_modal_inputs([LINES[0], LINES[0] | {"pixel_values": torch.zeros(2, 3, 2, 8)}])
    with pytest.raises(ValueError, match=r"pixel_values: cannot be concatenated on the last .*\(1, 3, 4, 8\)"):
        extract_multi_modal_inputs([LINES[0], LINES[0] | {"pixel_values": torch.zeros(1, 3, 4, 8)}])
