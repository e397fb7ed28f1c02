"""The image tripwire: each way in which an image can be lost, and that both numbers are in the message."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from common.types import MediaUse, PlaceholderRange, PromptInfo
from learner.rollouts.tripwire import ImageMismatch, check_images
from tests.helpers.fakes import PLACEHOLDER_ID, make_completion, make_sample, process

IMAGES = (b"first", b"second")
EXPECTED = process(make_sample(1, IMAGES))
USES = tuple(MediaUse(sha256, PlaceholderRange(3 * i, 3), 3) for i, sha256 in enumerate(EXPECTED.media_sha256))
PROMPT = PromptInfo("g", "a", EXPECTED.input_ids, EXPECTED.input_ids, USES, (PLACEHOLDER_ID,))
COMPLETIONS = (make_completion("g", 0, "a"),)


def test_equal_answers_pass() -> None:
    check_images(EXPECTED, PROMPT, COMPLETIONS)


def test_an_image_is_one_embedding_or_more_also_where_both_sides_agree() -> None:
    """What both make nothing of is lost too."""

    def check(num_tokens: int) -> None:
        expected = dataclasses.replace(EXPECTED, num_image_tokens=(num_tokens, 3))
        use = dataclasses.replace(USES[0], num_tokens=num_tokens)
        check_images(expected, dataclasses.replace(PROMPT, media=(use, USES[1])), COMPLETIONS)

    check(1)
    with pytest.raises(ImageMismatch, match=r"media\[0\] has 0 embeddings in 3 tokens"):
        check(0)


def longer_ids() -> Any:
    return np.append(EXPECTED.input_ids, np.int32(9))


def changed_ids() -> Any:
    ids = EXPECTED.input_ids.copy()
    ids[7] = 300
    return ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"media": ()}, "2 images were sent, the actor used 0"),
        ({"media": USES[:1]}, "2 images were sent, the actor used 1"),
        ({"media": USES[::-1]}, r"media\[0\] was sent as a7937b64\w+, the actor used 16367aac\w+"),
        (
            {"media": (dataclasses.replace(USES[0], placeholder=PlaceholderRange(0, 2)), USES[1])},
            r"media\[0\] has 3 embeddings in 2 tokens",
        ),
        (
            {"media": (USES[0], dataclasses.replace(USES[1], num_tokens=0))},
            r"media\[1\] has 0 embeddings on the actor, 3 by the learner's own processor",
        ),
        ({"expanded_ids": longer_ids()}, "has 12 ids on the actor, 11 by the learner"),
        ({"expanded_ids": changed_ids()}, "differ first at 7: 300 on the actor, 113 on the learner"),
    ],
)
def test_each_difference_is_told_with_both_numbers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageMismatch, match=message):
        check_images(EXPECTED, dataclasses.replace(PROMPT, **change), COMPLETIONS)


def test_a_completion_with_a_placeholder_id() -> None:
    completion = dataclasses.replace(COMPLETIONS[0], token_ids=np.array([5, PLACEHOLDER_ID], np.int32))
    with pytest.raises(ImageMismatch, match="completion 0 holds the placeholder id 1"):
        check_images(EXPECTED, PROMPT, (completion,))
