"""Rewards in TRL's form: one call for a whole group, with lists.

    def reward_func(prompts, completions, completion_ids, **columns) -> list[float | None]: ...

As in TRL with conversational prompts, a prompt is a list of messages and a completion a list of one message. Every
column of the dataset is a list too, and None stands for a completion that the function does not judge.
"""

import contextlib
import io
from collections.abc import Callable, Iterable
from typing import Any

from common.types import ChatMessage, TextPart
from learner.rewards.base import Judgement, RewardError, ScoringTask, as_number
from learner.rewards.raised import raised
from learner.types import PromptSample

ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
"""A function with one of these has this form."""

TRAINER_ONLY = frozenset({"trainer_state", "log_extra", "log_metric", "environments"})
"""What only TRL's own trainer can hand over."""

_RESERVED = ARGUMENTS | TRAINER_ONLY | {"prompt", "completion"}


def score_group(call: Callable[..., Any], name: str, task: ScoringTask) -> list[Judgement]:
    """One call for the group. Raises `RewardError`."""
    num = len(task.texts)
    where = f"row {task.sample.row}"
    try:
        returned = call(
            prompts=[_messages(task.sample.messages)] * num,
            completions=[[{"role": "assistant", "content": text}] for text in task.texts],
            completion_ids=[list(ids) for ids in task.token_ids],
            **{column: [value] * num for column, value in _columns(task.sample).items()},
        )
    except Exception as error:  # a user's code: whatever it raises costs this group
        raise raised(error, where, name) from error
    values = list(returned) if isinstance(returned, Iterable) else None
    if values is None or len(values) != num:
        got = f"{returned!r}" if values is None else f"{len(values)} rewards"
        raise RewardError("REWARD_NOT_A_NUMBER", f"{where}: {got} for {num} completions ({name})")
    return [
        None if value is None else as_number(value, value, f"{task.where(index)} ({name})")
        for index, value in enumerate(values)
    ]


def _columns(sample: PromptSample) -> dict[str, Any]:
    """What the row has beside its prompt; images are PIL images, as the model sees them."""
    columns = {"ground_truth": sample.ground_truth, "solution": sample.ground_truth, "data_source": sample.data_source}
    columns |= {name: value for name, value in sample.extra.items() if name not in _RESERVED}
    if sample.images:
        columns["images"] = [_image(file) for file in sample.images]
    return columns


def _image(file: bytes) -> Any:
    """As the model sees it; not decoded yet where that is how it is stored, since few functions look at images."""
    from PIL import ExifTags, Image

    from common.media import as_shown

    image = Image.open(io.BytesIO(file))
    if image.format == "PNG":  # whether it is turned may be said behind the pixels, in any of these chunks
        is_turned = any(kind in file for kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"))
    else:
        is_turned = False
        with contextlib.suppress(Exception):  # damaged EXIF data say nothing
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return as_shown(image) if is_turned or image.mode != "RGB" or image.has_transparency_data else image


def _messages(messages: tuple[ChatMessage, ...]) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": _content(message)} for message in messages]


def _content(message: ChatMessage) -> str | list[dict[str, str]]:
    texts = [part.text for part in message.parts if isinstance(part, TextPart)]
    if len(texts) == len(message.parts):
        return "".join(texts)
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.parts
    ]
