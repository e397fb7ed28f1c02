"""A fake engine whose actors a real learner can train with: it knows what the model's processor makes of the digits.

Their prompt is the same for every row but for the image, and so are its ids. An actor thus needs neither the processor
nor what that takes seconds to import.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actor.config import FakeConfig
from actor.engine import EngineInfo, EngineRequest
from actor.engine_fake.engine import FakeEngine
from actor.engine_fake.prompts import FakePrompts
from common.types import MediaUse, PlaceholderRange, PromptInfo


@dataclass(frozen=True, slots=True)
class DigitsPrompt:
    """Of every row: its expanded ids, and those that stand for an image and for a video."""

    ids: tuple[int, ...]
    placeholders: tuple[int, int]

    @classmethod
    def of(cls, model_dir: Path) -> "DigitsPrompt":
        """By the learner's own processor."""
        from examples.digits.data import train
        from examples.digits.model import TOKEN_IDS
        from learner.batch.processing import PromptProcessor

        ids = PromptProcessor(model_dir).process(train()[0]).input_ids
        return cls(tuple(ids.tolist()), (TOKEN_IDS["<|image_pad|>"], TOKEN_IDS["<|video_pad|>"]))


class DigitsEngine(FakeEngine):
    """The fake engine, but for what it makes of a prompt."""

    def __init__(self, config: FakeConfig, actor_id: str, prompt: DigitsPrompt) -> None:
        super().__init__(config, actor_id)
        self._prompt = prompt
        self._prompts = _DigitsPrompts(prompt, actor_id)

    async def start(self) -> EngineInfo:
        """See `Engine.start`."""
        info = await super().start()
        return dataclasses.replace(info, suppressed_token_ids=self._prompt.placeholders)


class _DigitsPrompts(FakePrompts):
    def __init__(self, prompt: DigitsPrompt, actor_id: str) -> None:
        self._prompt = prompt
        self._actor_id = actor_id

    def understand(self, request: EngineRequest) -> PromptInfo:
        ids, image_id = np.array(self._prompt.ids, np.int32), self._prompt.placeholders[0]
        image = PlaceholderRange(self._prompt.ids.index(image_id), self._prompt.ids.count(image_id))
        return PromptInfo(
            group_id=request.group_id,
            actor_id=self._actor_id,
            unexpanded_ids=ids,
            expanded_ids=ids,
            media=(MediaUse(request.media[0].sha256, image, image.length, (1, 4, 4)),),
            suppressed_token_ids=self._prompt.placeholders,
        )
