"""What the fake engine makes of a prompt: an id for each byte, and a fixed number of placeholders for each image."""

import numpy as np

from actor.config import FakeConfig
from actor.engine import EngineMedia, EngineRequest
from actor.engine_fake.answers import processed
from common.errors import InvalidRequest
from common.types import ChatPrompt, MediaPart, MediaUse, PlaceholderRange, Prompt, PromptInfo, TextPrompt, TokenPrompt

PLACEHOLDER_ID = 1
FIRST_TEXT_ID = 2


class FakePrompts:
    """`PLACEHOLDER_ID` stands for media and is never sampled."""

    def __init__(self, config: FakeConfig, actor_id: str) -> None:
        self._config = config
        self._actor_id = actor_id

    def understand(self, request: EngineRequest) -> PromptInfo:
        """Each media item is one placeholder, expanded to `tokens_per_image`. Raises InvalidRequest."""
        unexpanded = self._tokenize(request)
        is_expanded = isinstance(request.prompt, TokenPrompt) and bool(request.prompt.placeholders)
        if is_expanded:
            unexpanded = self._collapse(request.prompt, request.media)
        num_media = unexpanded.count(PLACEHOLDER_ID)
        if num_media != len(request.media):
            raise InvalidRequest("media", f"{len(request.media)} items came, the prompt has room for {num_media}")
        expanded: list[int] = []
        uses: list[MediaUse] = []
        for token_id in unexpanded:
            if token_id == PLACEHOLDER_ID:
                item = request.media[len(uses)]
                length = self._num_tokens(item)
                run = PlaceholderRange(len(expanded), length)
                tensors = processed(item) if request.return_processed else ()
                grid = (length // self._config.tokens_per_image, 2, 2 * self._config.tokens_per_image)
                uses.append(MediaUse(item.sha256, run, length, grid, item.modality, tensors))
                expanded += [PLACEHOLDER_ID] * length
            else:
                expanded.append(token_id)
        return PromptInfo(
            group_id=request.group_id,
            actor_id=self._actor_id,
            unexpanded_ids=np.asarray([] if is_expanded else unexpanded, np.int32),
            expanded_ids=np.asarray(expanded, np.int32),
            media=tuple(uses),
            suppressed_token_ids=(PLACEHOLDER_ID,),
        )

    def _num_tokens(self, item: EngineMedia) -> int:
        num_frames = len(item.content) if isinstance(item.content, np.ndarray) else 1
        return num_frames * self._config.tokens_per_image

    def _collapse(self, prompt: Prompt, media: tuple[EngineMedia, ...]) -> list[int]:
        """Expanded ids without what was expanded; each range must be what this engine makes of an item."""
        assert isinstance(prompt, TokenPrompt)
        ids, end = [], 0
        for i, (run, item) in enumerate(zip(prompt.placeholders, media, strict=True)):
            length = self._num_tokens(item)
            if prompt.ids[run.offset : run.offset + run.length] != (PLACEHOLDER_ID,) * length:
                raise InvalidRequest(
                    f"tokens.placeholders[{i}]",
                    f"is {run.length} tokens at {run.offset}; the processor yields {length} for media[{i}]",
                )
            ids += [*prompt.ids[end : run.offset], PLACEHOLDER_ID]
            end = run.offset + run.length
        return [*ids, *prompt.ids[end:]]

    def _tokenize(self, request: EngineRequest) -> list[int]:
        match request.prompt:
            case TokenPrompt(token_ids):
                return list(token_ids)
            case TextPrompt(text):
                return [PLACEHOLDER_ID] * len(request.media) + self._text_ids(text)
            case ChatPrompt(messages, _):
                ids: list[int] = []
                for message in messages:
                    ids += self._text_ids(message.role)
                    for part in message.parts:
                        ids += [PLACEHOLDER_ID] if isinstance(part, MediaPart) else self._text_ids(part.text)
                return ids

    def _text_ids(self, text: str) -> list[int]:
        return [FIRST_TEXT_ID + byte % (self._config.vocab_size - FIRST_TEXT_ID) for byte in text.encode()]
