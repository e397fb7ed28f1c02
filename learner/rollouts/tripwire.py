"""The image tripwire: what the actor made of a prompt must be what the learner makes of it.

A rollout whose images were lost on the way still looks like a rollout: the model answers, the reward is just lower.
So every group is compared with the learner's own processor before anything is trained on it, and a difference stops
the run with both numbers in the message.
"""

import grpc
import numpy as np

from common.errors import OutriderError
from common.types import Completion, PromptInfo
from learner.types import ProcessedPrompt


class ImageMismatch(OutriderError):  # noqa: N818 - as its kin in common.errors
    """Actor and learner disagree about the images or ids of a prompt. The message holds both values."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "IMAGE_MISMATCH"


def check_images(expected: ProcessedPrompt, prompt: PromptInfo, completions: tuple[Completion, ...]) -> None:
    """Hold an actor's answer against the learner's own processor.

    Raises `ImageMismatch` where the number of images, a hash, the number of an image's embeddings or the expanded ids
    differ, and where a completion holds a placeholder id.
    """
    where = f"group {prompt.group_id} on actor {prompt.actor_id}"
    if len(prompt.media) != len(expected.media_sha256):
        raise ImageMismatch(
            f"{where}: {len(expected.media_sha256)} images were sent, the actor used {len(prompt.media)}"
        )
    for i, (use, sha256, num_tokens) in enumerate(
        zip(prompt.media, expected.media_sha256, expected.num_image_tokens, strict=True)
    ):
        if use.sha256 != sha256:
            raise ImageMismatch(f"{where}: media[{i}] was sent as {sha256.hex()}, the actor used {use.sha256.hex()}")
        if use.num_tokens != num_tokens:
            raise ImageMismatch(
                f"{where}: media[{i}] has {use.num_tokens} embeddings on the actor, {num_tokens} by the learner's own "
                "processor"
            )
        if not 0 < use.num_tokens <= use.placeholder.length:
            raise ImageMismatch(
                f"{where}: media[{i}] has {use.num_tokens} embeddings in {use.placeholder.length} tokens"
            )
    if not np.array_equal(prompt.expanded_ids, expected.input_ids):
        raise ImageMismatch(f"{where}: {_first_difference(expected.input_ids, prompt.expanded_ids)}")
    for completion in completions:
        found = set(completion.token_ids.tolist()).intersection(prompt.suppressed_token_ids)
        if found:
            raise ImageMismatch(f"{where}: completion {completion.index} holds the placeholder id {min(found)}")


def _first_difference(learner: np.ndarray, actor: np.ndarray) -> str:
    common = min(len(learner), len(actor))
    different = np.flatnonzero(learner[:common] != actor[:common])
    lengths = f"the prompt has {len(actor)} ids on the actor, {len(learner)} by the learner's own processor"
    if not len(different):
        return lengths
    at = int(different[0])
    return f"{lengths}; they differ first at {at}: {actor[at]} on the actor, {learner[at]} on the learner"
