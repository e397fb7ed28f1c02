import numpy as np
import pytest

from common.arrays import rollout_arrays
from common.client import SampledGroup
from common.types import BeamScore, Completion, FinishReason, PromptInfo


def _completion(index: int, ids: list[int], logprobs: list[float], beam: BeamScore | None = None) -> Completion:
    return Completion(
        f"g/{index}/a",
        index,
        np.array(ids, np.int32),
        np.array(logprobs, np.float32),
        FinishReason.STOP,
        (),
        beam=beam,
    )


def _group(prompt: list[int], *completions: Completion) -> SampledGroup:
    ids = np.array(prompt, np.int32)
    return SampledGroup(PromptInfo("g", "a", ids, ids), completions)


GROUPS = [
    _group([5, 6, 7], _completion(0, [10], [-0.5]), _completion(1, [11, 12, 2], [-0.25, -1, -2])),
    _group([8], _completion(0, [13, 2], [-3, -4]), _completion(1, [2], [-0.125])),
]


def test_the_arrays_of_two_groups() -> None:
    """By hand; 99 is the pad id."""
    arrays = rollout_arrays(GROUPS, pad_token_id=99)
    assert arrays.prompts.tolist() == [[5, 6, 7], [5, 6, 7], [99, 99, 8], [99, 99, 8]]
    assert arrays.responses.tolist() == [[10, 99, 99], [11, 12, 2], [13, 2, 99], [2, 99, 99]]
    assert arrays.input_ids.tolist() == [
        [5, 6, 7, 10, 99, 99],
        [5, 6, 7, 11, 12, 2],
        [99, 99, 8, 13, 2, 99],
        [99, 99, 8, 2, 99, 99],
    ]
    assert arrays.attention_mask.tolist() == [
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 0, 0],
    ]
    assert arrays.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [0, 0, 0, 1, 2, 3],
        [0, 0, 0, 1, 2, 3],
    ]
    assert arrays.response_mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert arrays.old_log_probs.tolist() == [[-0.5, 0, 0], [-0.25, -1, -2], [-3, -4, 0], [-0.125, 0, 0]]
    assert arrays.group_ids.tolist() == [0, 0, 1, 1]
    assert {array.dtype for array in (arrays.input_ids, arrays.attention_mask, arrays.group_ids)} == {np.dtype("int64")}
    assert arrays.old_log_probs.dtype == np.float32


def test_a_real_pad_id_inside_a_row_is_no_padding() -> None:
    arrays = rollout_arrays([_group([5, 0], _completion(0, [0, 2], [-1, -2]))], pad_token_id=0)
    assert arrays.attention_mask.tolist() == [[1, 1, 1, 1]]


def test_given_lengths() -> None:
    arrays = rollout_arrays(GROUPS, 0, prompt_length=4, response_length=5)
    assert arrays.input_ids.shape == (4, 9)
    assert arrays.prompts[0].tolist() == [0, 5, 6, 7]
    assert arrays.old_log_probs[0].tolist() == [-0.5, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="a prompt of 3 tokens; the arrays have 2"):
        rollout_arrays(GROUPS, 0, prompt_length=2)
    with pytest.raises(ValueError, match="a completion of 3 tokens; the arrays have 2"):
        rollout_arrays(GROUPS, 0, response_length=2)


def test_what_is_no_rollout() -> None:
    with pytest.raises(ValueError, match="no completions"):
        rollout_arrays([], 0)
    beam = _group([5], _completion(0, [10], [-0.5], BeamScore(-0.5, -0.25)))
    with pytest.raises(ValueError, match="g/0/a was found by beam search"):
        rollout_arrays([beam], 0)
    assert rollout_arrays([beam], 0, allow_beams=True).input_ids.tolist() == [[5, 10]]
