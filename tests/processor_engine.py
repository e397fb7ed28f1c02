"""A fake engine whose actors a real learner can train with: the tripwire finds nothing wrong with their answers."""

import dataclasses
import io
from pathlib import Path

import numpy as np
from PIL import Image

from actor.config import FakeConfig
from actor.engine import EngineInfo, EngineRequest
from actor.engine_fake import FakeEngine
from common.types import ChatPrompt, MediaUse, PlaceholderRange, PromptInfo
from examples.digits.model import TOKEN_IDS
from learner.batch.processing import PromptProcessor
from learner.types import PromptSample

PLACEHOLDERS = (TOKEN_IDS["<|image_pad|>"], TOKEN_IDS["<|video_pad|>"])


class ProcessorEngine(FakeEngine):
    """The fake engine, but prompts are what the model's own processor makes of them."""

    def __init__(self, config: FakeConfig, actor_id: str, model_dir: Path) -> None:
        super().__init__(config, actor_id)
        self._processor = PromptProcessor(model_dir)

    async def start(self) -> EngineInfo:
        """See `Engine.start`."""
        info = await super().start()
        return dataclasses.replace(info, suppressed_token_ids=PLACEHOLDERS)

    def _prompt_info(self, request: EngineRequest) -> PromptInfo:
        assert isinstance(request.prompt, ChatPrompt)
        images = tuple(_png(item.content) for item in request.media if isinstance(item.content, Image.Image))
        processed = self._processor.process(PromptSample(0, request.prompt.messages, images, ""))
        places = np.flatnonzero(processed.input_ids == PLACEHOLDERS[0])
        (length,) = processed.num_image_tokens
        return PromptInfo(
            group_id=request.group_id,
            actor_id=self._actor_id,
            unexpanded_ids=processed.input_ids,
            expanded_ids=processed.input_ids,
            media=(MediaUse(request.media[0].sha256, PlaceholderRange(int(places[0]), length), length, (1, 4, 4)),),
            suppressed_token_ids=PLACEHOLDERS,
        )


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
