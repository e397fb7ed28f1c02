"""From a request to what vLLM's engine takes, and to what the caller is told of it; and from ids back to text."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actor.engine import EngineMedia, EngineRequest
from actor.engine_vllm.media import VllmMedia
from common.chat import has_template, render_chat
from common.errors import InvalidRequest, TooLarge
from common.media.placeholders import placeholder_ids
from common.types import ChatMessage, ChatPrompt, MediaPart, Prompt, PromptInfo, TextPart, TextPrompt, TokenPrompt

if TYPE_CHECKING:
    from vllm.inputs import EngineInput


_HELLO = "Hello."


class VllmPrompts:
    """The tokenizer, the chat template and the media of one engine.

    `placeholder_ids`: those that stand for media in an expanded prompt, and that no completion has. `max_item_tokens`:
    what vLLM's encoder cache has room for.
    """

    def __init__(self, model: Path, renderer: Any, model_config: Any, actor_id: str, max_item_tokens: int) -> None:
        import transformers

        self._processor = transformers.AutoProcessor.from_pretrained(model)
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._tokenizing = threading.Lock()
        self._media = VllmMedia(renderer, model_config.max_model_len)
        self._max_context_tokens: int = model_config.max_model_len
        self._max_item_tokens = max_item_tokens
        self._actor_id = actor_id
        self.placeholder_ids = placeholder_ids(model_config.hf_config)

    @property
    def takes_videos(self) -> bool:
        """Whether the model has a place for them."""
        return self._media.takes_videos

    async def understand(self, request: EngineRequest, *, with_tensors: bool) -> "tuple[PromptInfo, EngineInput]":
        """What the caller is told of the prompt, and what the engine takes for it.

        `with_tensors`: see `VllmMedia.render`. Raises InvalidRequest and TooLarge.
        """
        from vllm.exceptions import VLLMClientError

        placeholders = request.prompt.placeholders if isinstance(request.prompt, TokenPrompt) else ()
        try:
            token_ids = await asyncio.to_thread(self._tokenize, request)
            engine_input = await self._media.render(token_ids, placeholders, request.media, with_tensors=with_tensors)
            if not self._media.is_known(engine_input):
                engine_input = await self._media.render(token_ids, placeholders, request.media, with_tensors=True)
        except (ValueError, VLLMClientError) as error:
            raise InvalidRequest("prompt", " ".join(str(error).split())) from error
        return self._info(request, [] if placeholders else token_ids, engine_input), engine_input

    def greeting(self, *, has_image: bool) -> Prompt:
        """A short prompt that the model takes, with one image or none."""
        if has_template(self._processor):
            parts = ((MediaPart(0),) if has_image else ()) + (TextPart(_HELLO),)
            return ChatPrompt((ChatMessage("user", parts),))
        return TextPrompt((self._media.image_text() if has_image else "") + _HELLO)

    def by_name(self, engine_input: "EngineInput") -> "EngineInput":
        """See `VllmMedia.by_name`."""
        return self._media.by_name(engine_input)

    def forget(self, media: Sequence[EngineMedia]) -> None:
        """See `VllmMedia.forget`."""
        self._media.forget(media)

    async def text(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Of these ids."""
        return await asyncio.to_thread(self._detokenize, token_ids, skip_special_tokens)

    def _info(self, request: EngineRequest, unexpanded: list[int], engine_input: Any) -> PromptInfo:
        expanded_ids = np.asarray(engine_input["prompt_token_ids"], np.int32)
        room = self._max_context_tokens - len(expanded_ids)
        if room <= 0:
            raise InvalidRequest(
                "prompt", f"{len(expanded_ids)} tokens leave no room in a context of {self._max_context_tokens}"
            )
        wanted = request.sampling
        if not wanted.max_tokens and wanted.min_tokens > room:
            raise InvalidRequest("sampling.min_tokens", f"is {wanted.min_tokens}; the prompt leaves room for {room}")
        media = self._media.uses(engine_input, request.media, with_tensors=request.return_processed)
        for i, use in enumerate(media):
            if use.num_tokens > self._max_item_tokens:
                raise TooLarge(
                    f"media[{i}]",
                    f"makes {use.num_tokens} tokens; this server takes items of up to {self._max_item_tokens}",
                )
        is_filled = np.zeros(len(expanded_ids), bool)
        for use in media:
            is_filled[use.placeholder.offset : use.placeholder.offset + use.placeholder.length] = True
        stray = np.flatnonzero(np.isin(expanded_ids, self.placeholder_ids) & ~is_filled)
        if len(stray):
            raise InvalidRequest("prompt", f"{len(stray)} placeholder tokens, for which there are no media")
        return PromptInfo(
            group_id=request.group_id,
            actor_id=self._actor_id,
            unexpanded_ids=np.asarray(unexpanded, np.int32),
            expanded_ids=expanded_ids,
            media=media,
            suppressed_token_ids=self.placeholder_ids,
        )

    def _tokenize(self, request: EngineRequest) -> list[int]:
        """Ids with one placeholder for each media item, before vLLM expands them; in a thread, one at a time."""
        with self._tokenizing:  # fast tokenizers are not safe to call from two threads at once
            return self._token_ids(request)

    def _detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        with self._tokenizing:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def _token_ids(self, request: EngineRequest) -> list[int]:
        prompt = request.prompt
        if isinstance(prompt, TokenPrompt):
            return list(prompt.ids)
        if isinstance(prompt, TextPrompt):
            return list(self._tokenizer(prompt.text).input_ids)
        text = render_chat(self._processor, prompt, [item.modality for item in request.media])
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)
