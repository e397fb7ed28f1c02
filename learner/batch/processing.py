"""A prompt through the model's own processor: expanded ids, positions, media tensors.

The learner trains with what comes out here, and holds the actor's answer against it (the image tripwire).
"""

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common import torchvision_ops
from common.chat import render_chat
from common.config import ConfigError
from common.errors import InvalidRequest, TooLarge, Unimplemented
from common.media import content_hash, decode_image
from common.media.placeholders import image_token_id
from common.media.resizing import resize_options
from common.types import MediaPart, Modality, ServerLimits
from learner.batch.positions import PositionIndexer
from learner.types import PixelBounds, ProcessedPrompt, PromptSample

_TOO_LARGE = "; make it smaller, or raise data.max_media_pixels and the actors' limits.max_media_pixels"
# Outputs of a processor that are not inputs of the media.
_TEXT_OUTPUTS = frozenset({"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"})
# Where a processor finds its chat template, in its order.
_TEMPLATE_FILES = ("chat_template.json", "chat_template.jinja")
# Samples whose decoded images are held at once.
_MAX_DECODED = 4


class PromptProcessor:
    """Turns samples into `ProcessedPrompt`s, remembering the latest. Thread safe; run it off the event loop.

    Args:
        model_dir: a checkpoint directory with its processor.
        max_pixels: of one image, before the processor resizes it and after.
        cache_bytes: bound on what is remembered.

    Raises:
        ValueError: the directory has no processor for images and text.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        max_pixels: int = ServerLimits().max_media_pixels,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        torchvision_ops.install()
        from transformers import AutoConfig, AutoProcessor

        self._processor = AutoProcessor.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        self._model_dir = Path(model_dir)
        self._has_images = getattr(self._processor, "image_processor", None) is not None
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        self._positions = PositionIndexer(config)
        self._image_token_id = image_token_id(config)
        self._cache: OrderedDict[bytes, ProcessedPrompt] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._max_pixels = max_pixels
        self._cached_bytes = 0
        self._cache_lock = threading.Lock()
        # Fast tokenizers are not safe to call from two threads at once, so completions have a copy of their own.
        self._lock = threading.Lock()
        self._tokenizer = copy.deepcopy(getattr(self._processor, "tokenizer", self._processor))
        self._tokenizer_lock = threading.Lock()
        self._decoding = threading.Semaphore(_MAX_DECODED)
        self.filler = self._filler() if self._has_images else None
        """The smallest image that the model takes, alone, for packs without media; None for a model without vision."""

    def process(self, sample: PromptSample) -> ProcessedPrompt:
        """Render, tokenize and expand a sample's messages with its images.

        Raises:
            ConfigError: messages and images do not fit together, or an image cannot be decoded; it names the row.
        """
        sha256 = tuple(content_hash(image) for image in sample.images)
        key = hashlib.sha256(repr((sample.chat, sha256, sample.image_bounds)).encode()).digest()
        if known := self._known(key):
            return known
        bounds = [bounds for _, bounds in sample.bounded_images]
        try:
            with self._decoding:
                images = self._decoded(sample)
                with self._lock:
                    if known := self._known(key):  # another thread was quicker
                        return known
                    processed = self._run(self._rendered(sample), images, sha256, bounds)
                    self._remember(key, processed)
                    return processed
        except (ValueError, InvalidRequest, TooLarge, Unimplemented) as error:
            source = f" of {sample.data_source}" if sample.data_source else ""
            hint = _TOO_LARGE if isinstance(error, TooLarge) else ""
            raise ConfigError(f"row {sample.row}{source}: {error}{hint}") from error

    def decode(self, token_ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Ids to text, special tokens left out or kept."""
        with self._tokenizer_lock:
            text: str = self._tokenizer.decode(token_ids, skip_special_tokens=not keep_special)
        return text

    def _rendered(self, sample: PromptSample) -> str:
        text = render_chat(self._processor, sample.chat)
        if sample.images and self._has_images and self._processor.image_token not in text:
            paths = [path for name in _TEMPLATE_FILES if (path := self._model_dir / name).is_file()]
            where = paths[0] if paths else self._model_dir
            raise ValueError(
                f"the chat template ({where}) writes no {self._processor.image_token}, which stands for an image; put "
                "the one of the vision model there that the checkpoint was made from"
            )
        return text

    def _decoded(self, sample: PromptSample) -> list[Image.Image]:
        parts = [part for message in sample.messages for part in message.parts]
        indices = [part.index for part in parts if isinstance(part, MediaPart)]
        if indices != list(range(len(sample.images))):
            raise ValueError(f"its messages refer to images {indices}, but it has {len(sample.images)}")
        return [decode_image(image, f"images[{i}]", self._max_pixels) for i, image in enumerate(sample.images)]

    def _run(
        self, text: str, images: Sequence[Image.Image], sha256: tuple[bytes, ...], bounds: Sequence[PixelBounds]
    ) -> ProcessedPrompt:
        output = self._output(text, images, [self._options(i, given) for i, given in enumerate(bounds)])
        input_ids: Tensor = output["input_ids"][0]
        position_ids, next_position = self._positions(input_ids, output)
        media = {name: value for name, value in output.items() if name not in _TEXT_OUTPUTS}
        return ProcessedPrompt(
            input_ids=input_ids.int().numpy(),
            position_ids=position_ids.numpy(),
            next_position=next_position,
            media=media,
            media_sha256=sha256,
            num_image_tokens=self._num_image_tokens(input_ids, output, images),
        )

    def _options(self, i: int, bounds: PixelBounds) -> dict[str, Any]:
        """How the processor resizes image i."""
        field = f"images[{i}]"
        largest = max(bounds.min_pixels or 0, bounds.max_pixels or 0)
        if largest > self._max_pixels:
            raise TooLarge(field, f"resized to up to {largest} pixels, more than the limit of {self._max_pixels}")
        return resize_options(self._processor, Modality.IMAGE, bounds.min_pixels, bounds.max_pixels, field)

    def _output(self, text: str, images: Sequence[Image.Image], options: Sequence[dict[str, Any]]) -> Mapping[str, Any]:
        """What the processor yields, which takes one set of options a call: with several, text and images in pieces."""
        if all(each == options[0] for each in options):
            arguments: dict[str, Any] = {"images": list(images)} | options[0] if images else {}
            output: Mapping[str, Any] = self._processor(text=[text], return_tensors="pt", **arguments)
            return output
        token = self._processor.image_token
        *pieces, end = text.split(token)
        texts = [piece + token for piece in pieces[:-1]] + [pieces[-1] + token + end]
        outputs = [
            self._processor(text=[piece], images=[image], return_tensors="pt", **each)
            for piece, image, each in zip(texts, images, options, strict=True)
        ]
        return {
            name: torch.cat([output[name] for output in outputs], dim=1 if name in _TEXT_OUTPUTS else 0)
            for name in outputs[0]
        }

    def _num_image_tokens(
        self, input_ids: Tensor, output: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> tuple[int, ...]:
        """Image tokens of each image; their sum is checked against the ids."""
        if not images:
            return ()
        in_prompt = input_ids.tolist().count(self._image_token_id)
        if "image_grid_thw" in output:
            merge = self._processor.image_processor.merge_size**2
            lengths = tuple(int(grid) // merge for grid in output["image_grid_thw"].prod(-1))
        elif len(images) == 1:
            lengths = (in_prompt,)
        else:
            lengths = self._count_apart(images)
        if len(lengths) != len(images) or sum(lengths) != in_prompt:
            raise ValueError(
                f"the processor expanded {len(images)} images to {lengths} tokens, but the prompt holds {in_prompt} "
                "image tokens"
            )
        return lengths

    def _count_apart(self, images: Sequence[Image.Image]) -> tuple[int, ...]:
        """Image tokens of each of several images, which may stand side by side or in parts: with a token in between."""
        tokenizer = self._processor.tokenizer
        text = f"{self._processor.image_token}{tokenizer.eos_token}" * len(images)
        input_ids = self._processor(text=[text], images=list(images), return_tensors="pt")["input_ids"][0]
        image_number = (input_ids == tokenizer.eos_token_id).cumsum(0)
        counts = torch.bincount(image_number[input_ids == self._image_token_id], minlength=len(images))
        return tuple(counts.tolist())

    def _filler(self) -> ProcessedPrompt:
        image_processor = self._processor.image_processor
        side = getattr(image_processor, "patch_size", 14) * getattr(image_processor, "merge_size", 2)
        return self._run(self._processor.image_token, [Image.new("RGB", (side, side))], (b"\0" * 32,), [PixelBounds()])

    def _known(self, key: bytes) -> ProcessedPrompt | None:
        with self._cache_lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def _remember(self, key: bytes, processed: ProcessedPrompt) -> None:
        with self._cache_lock:
            self._cache[key] = processed
            self._cached_bytes += _num_bytes(processed)
            while self._cached_bytes > self._cache_bytes and self._cache:
                _, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= _num_bytes(oldest)


def _num_bytes(processed: ProcessedPrompt) -> int:
    media = sum(value.nbytes for value in processed.media.values())
    return media + processed.input_ids.nbytes + processed.position_ids.nbytes
