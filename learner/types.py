"""The data that flows through the learner: a prompt, the prompt as the model sees it, and a finished group.

    dataset --PromptSample--> processor --ProcessedPrompt--> dispatcher (actors, rewards) --Group--> buffer --> trainer

No torch at import: configuration and data modules use these types too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from common.types import ChatMessage, ChatPrompt, Completion, FloatArray, IntArray, PromptInfo

if TYPE_CHECKING:
    import torch

PositionArray = npt.NDArray[np.int64]

RewardParts = Mapping[str, Sequence[float | None]]
"""Name of a reward function -> what it said of each completion, without its weight; None: nothing. What else a function
of verl's form measures is under `name.key`."""


@dataclass(frozen=True, slots=True)
class PixelBounds:
    """Bounds on height * width of an image after the processor's resizing. None: the model's own.

    Raises ValueError for bounds that no image keeps.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}; give a whole number, 1 or more")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels ({self.min_pixels}) is more than max_pixels ({self.max_pixels})")


@dataclass(frozen=True, slots=True)
class PromptSample:
    """One row of a dataset.

    `images` are encoded files (PNG, JPEG, WebP) in the order in which the `MediaPart`s of `messages` refer to them;
    `image_bounds` has one for each, or is empty for the model's own.

    Example: `PromptSample(row=7, messages=(ChatMessage("user", (MediaPart(0), TextPart("Which digit?"))),),
    images=(png_bytes,), ground_truth="3")`.
    """

    row: int
    messages: tuple[ChatMessage, ...]
    images: tuple[bytes, ...]
    ground_truth: Any
    data_source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    image_bounds: tuple[PixelBounds, ...] = ()
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Of the chat template."""

    @property
    def chat(self) -> ChatPrompt:
        """The prompt as actors take it."""
        return ChatPrompt(self.messages, self.template_arguments)

    @property
    def bounded_images(self) -> list[tuple[bytes, PixelBounds]]:
        """Each image with its bounds."""
        return list(zip(self.images, self.image_bounds or [PixelBounds()] * len(self.images), strict=True))


@dataclass(frozen=True, slots=True)
class ProcessedPrompt:
    """A prompt after the model's own processor: what the learner trains with and holds the actor's answer against.

    `media` maps the processor's tensor names to tensors (`pixel_values`, `image_grid_thw`, ...); empty for text.
    `media_sha256[i]` is the hash of image i, `num_image_tokens[i]` the tokens in `input_ids` that stand for it, one
    for each embedding.
    """

    input_ids: IntArray
    """`[P]`, expanded."""
    position_ids: PositionArray
    """`[3, P]` (temporal, height, width) where the model has M-RoPE, else `[1, P]`."""
    next_position: int
    """Position of the first completion token."""
    media: dict[str, torch.Tensor]
    media_sha256: tuple[bytes, ...]
    num_image_tokens: tuple[int, ...]


class Dataset(Protocol):
    """Rows by number; read from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> PromptSample: ...


class Processor(Protocol):
    """The model's own processor; called from several threads."""

    def process(self, sample: PromptSample) -> ProcessedPrompt:
        """Ids, positions and tensors of one prompt."""
        ...


@dataclass(frozen=True, slots=True)
class Scores:
    """What the completions of a group are worth.

    Example: `Scores(np.array([1.1, 0.1], np.float32), {"math_equal": (1.0, 0.0), "format": (1.0, 1.0)})`.
    """

    rewards: FloatArray
    """`[n]`, the weighted sums."""
    parts: RewardParts


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt with its `n` finished, rewarded completions, in the order of `Completion.index`."""

    group_id: str
    sequence: int
    """Place of the prompt in the data order; see `learner.data.ledger`."""
    sample: PromptSample
    processed: ProcessedPrompt
    prompt: PromptInfo
    completions: tuple[Completion, ...]
    rewards: FloatArray
    """`[n]`."""
    reward_parts: RewardParts = field(default_factory=dict)

    def stale_share(self, oldest_allowed: int) -> float:
        """Share of the tokens of all completions that a policy version before `oldest_allowed` produced."""
        spans = [span for completion in self.completions for span in completion.version_spans]
        stale = sum(span.end - span.start for span in spans if span.policy_version < oldest_allowed)
        return stale / sum(span.end - span.start for span in spans)

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that produced a token of this group."""
        return min(span.policy_version for completion in self.completions for span in completion.version_spans)
