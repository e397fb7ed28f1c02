"""One row of a dataset, as it is stored, to one `PromptSample`.

Two shapes of prompt are read: verl's, a list of `{"role", "content"}` with an `<image>` marker in the content for each
image, and Hugging Face's, with a list of `{"type": "text" | "image", ...}` as the content. A plain string is a user's
message; one that has no marker gets its images in front, as in TRL.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import ConfigError, NotYet
from common.types import ChatMessage, MediaPart, TextPart
from learner.data.images import image_file
from learner.types import PixelBounds, PromptSample

MARKER = "<image>"
# Of an image that is a dictionary: verl's, beside those of Hugging Face.
_FILE_KEYS, _BOUND_KEYS = ("bytes", "image", "path"), ("min_pixels", "max_pixels")
_DEFAULT_ANSWERS = ("reward_model.ground_truth", "ground_truth", "answer", "label")


@dataclass(frozen=True, slots=True)
class RowReader:
    """Which columns mean what.

    Args:
        source: names the dataset in errors.
        prompt_column: the prompt; without such a column every row asks `question`.
        image_column: one image or a list of them; "" for text only.
        answer_column: the ground truth, with dots into structs; "" tries verl's and the usual names.
        question: asked of every row that has no prompt of its own.
        system: a system prompt for rows that have none.
        suffix: goes right behind the text of the last user message.
        base_dir: image paths in rows are relative to it.
        bounds: of images that have none of their own.
        template_arguments: of the chat template.
        needs_markers: a text without a marker is a mistake, and its images do not go in front.
    """

    source: str
    prompt_column: str = "prompt"
    image_column: str = "images"
    answer_column: str = ""
    question: str = ""
    system: str = ""
    suffix: str = ""
    base_dir: Path = Path()
    bounds: PixelBounds = field(default_factory=PixelBounds)
    template_arguments: dict[str, Any] = field(default_factory=dict)
    needs_markers: bool = False

    def read(self, number: int, row: Mapping[str, Any] | PromptSample) -> PromptSample:
        """The sample of row `number`. Raises `ConfigError`, a line that names the row; `NotYet` if the disk fails."""
        if isinstance(row, PromptSample):
            return self._checked(number, row)
        images, bounds = self._images(number, row)
        if row.get("videos"):
            raise self._error(number, "has videos; this version takes images only")
        used = {self.prompt_column, self.image_column, "data_source", "videos"}
        return PromptSample(
            row=number,
            messages=self._framed(number, self._messages(number, row, len(images))),
            images=images,
            ground_truth=self._answer(number, row),
            data_source=str(row.get("data_source") or ""),
            extra={name: value for name, value in row.items() if name not in used},
            image_bounds=bounds,
            template_arguments=self.template_arguments,
        )

    def _checked(self, number: int, sample: PromptSample) -> PromptSample:
        """One that came as it is, with what it leaves open."""
        self._check_parts(number, sample.messages, len(sample.images))
        own = sample.image_bounds or (PixelBounds(),) * len(sample.images)
        if len(own) != len(sample.images):
            raise self._error(number, f"has image_bounds for {len(own)} images, but {len(sample.images)} images")
        bounds = tuple(self._bounds(number, i, dataclasses.asdict(each)) for i, each in enumerate(own))
        arguments = self._arguments(number, sample.template_arguments)
        messages = self._framed(number, sample.messages)
        return dataclasses.replace(sample, messages=messages, image_bounds=bounds, template_arguments=arguments)

    def _arguments(self, number: int, own: dict[str, Any]) -> dict[str, Any]:
        from common.chat import template_arguments
        from common.errors import InvalidRequest

        try:
            return template_arguments(self.template_arguments | own, "")
        except InvalidRequest as error:
            raise self._error(number, f"template_arguments: {error.message}") from None

    def _error(self, number: int, problem: str, kind: type[ConfigError] = ConfigError) -> ConfigError:
        return kind(f"{self.source}: row {number} {problem}")

    # ----------------------------------------------------------------------------------------------------- prompt

    def _messages(self, number: int, row: Mapping[str, Any], num_images: int) -> tuple[ChatMessage, ...]:
        prompt, needs_markers = row.get(self.prompt_column), self.needs_markers
        if prompt is None:
            if not self.question:
                raise self._error(number, f"has no {self.prompt_column!r}; name the column, or give a question")
            prompt, needs_markers = self.question, False
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, Sequence) or not prompt or not all(_is_message(message) for message in prompt):
            raise self._error(
                number, f"has a {self.prompt_column!r} that is neither text nor a list of role and content"
            )
        if not needs_markers and _is_one_text(prompt) and MARKER not in prompt[0]["content"]:
            prompt = [{"role": "user", "content": MARKER * num_images + prompt[0]["content"]}]
        next_image = 0
        messages = []
        for message in prompt:
            parts: list[TextPart | MediaPart] = []
            for part in self._parts(number, message["content"]):
                if part is None:
                    parts.append(MediaPart(next_image))
                    next_image += 1
                else:
                    parts.append(TextPart(part))
            messages.append(ChatMessage(str(message["role"]), tuple(parts)))
        self._check_parts(number, messages, num_images)
        return tuple(messages)

    def _framed(self, number: int, messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
        """With the system prompt and the suffix of all rows."""
        framed = list(messages)
        if self.suffix:
            last = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
            if last < 0:
                raise self._error(number, "has no message of the role 'user' for the suffix")
            parts, text = list(messages[last].parts), self.suffix
            if parts and isinstance(end := parts[-1], TextPart):
                text = end.text + text
                parts.pop()
            framed[last] = ChatMessage("user", (*parts, TextPart(text)))
        if self.system and all(message.role != "system" for message in messages):
            framed.insert(0, ChatMessage("system", (TextPart(self.system),)))
        return tuple(framed)

    def _parts(self, number: int, content: str | Sequence[Any]) -> list[str | None]:
        """Text, and None for each image. Nothing is left out: it would be missing from the prompt without a word."""
        if isinstance(content, str):
            pieces = re.split(f"({MARKER})", content)
            return [None if piece == MARKER else piece for piece in pieces if piece]
        parts: list[str | None] = []
        for part in content:
            values = part if isinstance(part, Mapping) else {"type": type(part).__name__}
            kind, text = values.get("type"), values.get("text")
            if kind == "image" and not any(values.get(key) for key in _BOUND_KEYS):
                parts.append(None)
            elif kind == "image":
                raise self._error(number, "bounds the pixels of an image in the prompt; do so in the image column")
            elif kind == "text" and isinstance(text, str):
                parts += [text] if text else []
            else:
                raise self._error(
                    number, f"has a content part of type {kind!r}; there are 'text', with its text, and 'image'"
                )
        return parts

    def _check_parts(self, number: int, messages: Sequence[ChatMessage], num_images: int) -> None:
        indices = [part.index for message in messages for part in message.parts if isinstance(part, MediaPart)]
        if indices != list(range(num_images)):
            raise self._error(
                number,
                f"has {len(indices)} {MARKER} markers for {num_images} images; "
                "write one marker, or part of type image, into the prompt for each image, in order",
            )

    def _answer(self, number: int, row: Mapping[str, Any]) -> Any:
        for path in (self.answer_column,) if self.answer_column else _DEFAULT_ANSWERS:
            value: Any = row
            for name in path.split("."):
                value = value.get(name) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        wanted = self.answer_column or " or ".join(_DEFAULT_ANSWERS)
        raise self._error(number, f"has no ground truth ({wanted}; it has {', '.join(row)}); set data.answer_column")

    # ----------------------------------------------------------------------------------------------------- images

    def _images(self, number: int, row: Mapping[str, Any]) -> tuple[tuple[bytes, ...], tuple[PixelBounds, ...]]:
        value = row.get(self.image_column) if self.image_column else None
        if value is None:
            return (), ()
        items = [
            self._image(number, i, item) for i, item in enumerate(value if isinstance(value, list | tuple) else [value])
        ]
        return tuple(file for file, _ in items), tuple(bounds for _, bounds in items)

    def _image(self, number: int, i: int, value: object) -> tuple[bytes, PixelBounds]:
        if not isinstance(value, Mapping):
            return self._file(number, i, value), self.bounds
        given = {key: item for key, item in value.items() if item is not None}
        if unknown := sorted(map(str, given.keys() - {*_FILE_KEYS, *_BOUND_KEYS})):
            known = ", ".join((*_FILE_KEYS, *_BOUND_KEYS))
            raise self._error(number, f"image {i} has {', '.join(unknown)}, which is not understood; there are {known}")
        file = next((given[key] for key in _FILE_KEYS if given.get(key)), None)
        return self._file(number, i, file), self._bounds(number, i, given)

    def _bounds(self, number: int, i: int, own: Mapping[str, Any]) -> PixelBounds:
        """The image's own, or those of all images."""
        try:
            return dataclasses.replace(
                self.bounds, **{key: own[key] for key in _BOUND_KEYS if own.get(key) is not None}
            )
        except ValueError as error:
            raise self._error(number, f"image {i}: {error}") from None

    def _file(self, number: int, i: int, value: object) -> bytes:
        try:
            return image_file(value, self.base_dir)
        except (ConfigError, NotYet) as error:
            raise self._error(number, f"image {i} {error}", type(error)) from None


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and "role" in value and isinstance(value.get("content"), str | list | tuple)


def _is_one_text(prompt: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all of it is one text of the user."""
    return len(prompt) == 1 and prompt[0]["role"] == "user" and isinstance(prompt[0]["content"], str)
