"""`data`: where the prompts come from. Imports no `datasets`, no gRPC and no torch."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from common.config import Config
from common.types import ServerLimits
from learner.types import PixelBounds

Format = Literal["auto", "parquet", "jsonl", "imagefolder", "arrow", "python"]


class DataConfig(Config):
    """Where the prompts come from."""

    train: str = Field(min_length=1)
    """A file, a folder, a glob where nothing has that very name, or "package.module:function"."""
    held_out: str = ""
    """As `train`, for the rows that are evaluated; or leave it empty and set `held_out_fraction`."""
    held_out_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the rows of `train` that is kept for evaluation."""
    split_seed: int = Field(0, ge=0)
    """Chooses those rows; apart from the run's seed."""
    max_held_out: int = Field(0, ge=0)
    """Evaluate on at most this many rows. 0: all."""
    format: Format = "auto"
    """Of `train` and `held_out`. "auto": by the names of their files."""
    prompt_column: str = "prompt"
    """Holds the question, or messages. `<image>` in them is where an image goes; those of a text without go in front
    of it, unless the first row has markers: then all rows need them."""
    image_column: str = "images"
    """Holds the images of a row; "" for text only."""
    answer_column: str = ""
    """Holds the ground truth for the rewards; dots lead into structs. "": verl's column or one of the usual names, as
    `answer`."""
    question: str = ""
    """Asked of every row that has no prompt column."""
    system: str = ""
    """A system prompt for rows that have none."""
    suffix: str = ""
    """Goes right behind the text of the last user message of each row."""
    min_pixels: int | None = None
    """Of an image once resized; its own min_pixels go first. None: the model's own."""
    max_pixels: int | None = None
    """As `min_pixels`."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Of a row that trains, with what its images expand to: longer ones are dropped groups (PROMPT_TOO_LONG). None:
    what the actors take."""
    max_media_pixels: int = Field(ServerLimits().max_media_pixels, ge=1)
    """Of an image; one with more ends the run. Actors have theirs (`limits.max_media_pixels`)."""
    chat_template_arguments: dict[str, Any] = Field(default_factory=dict)
    """Variables of the model's chat template, as enable_thinking."""

    @field_validator("chat_template_arguments")
    @classmethod
    def _arguments_that_cross(cls, values: dict[str, Any]) -> dict[str, Any]:
        from common.chat import template_arguments
        from common.errors import InvalidRequest

        try:
            return template_arguments(values, "")
        except InvalidRequest as error:
            raise ValueError(error.message) from None

    @property
    def bounds(self) -> PixelBounds:
        """Of images that have none of their own. Raises ValueError for bounds that no image keeps."""
        return PixelBounds(self.min_pixels, self.max_pixels)

    @model_validator(mode="after")
    def _bounds_within_the_limit(self) -> Self:
        bounds = self.bounds
        for name, value in (("min_pixels", bounds.min_pixels), ("max_pixels", bounds.max_pixels)):
            if value is not None and value > self.max_media_pixels:
                raise ValueError(f"{name} ({value}) is more than max_media_pixels ({self.max_media_pixels})")
        return self

    @model_validator(mode="after")
    def _one_held_out(self) -> Self:
        if self.held_out and self.held_out_fraction:
            raise ValueError("set held_out or held_out_fraction, not both")
        return self
