"""From ids and decoded media to what vLLM's engine takes, and back to what was done with each item.

Prompts in vLLM's own form (unexpanded ids, images, the model's own options) go through its renderer as they are. The
others are put together here, item by item, by the same multimodal processor: prompts that come expanded are held
against what the processor yields, tensors that come processed against what it would have yielded. Such requests carry
their tensors to the engine every time: they take part in the cache of processed items, but in none that lies in two
processes and must agree.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from actor.engine import EngineMedia
from actor.vllm_foreign_tensors import foreign_item
from common.dtypes import DTYPE_NAMES
from common.errors import InvalidRequest, Unimplemented
from common.tensors import NamedTensor, Tensor
from common.types import MediaUse, PlaceholderRange

if TYPE_CHECKING:
    from vllm.inputs import EngineInput

# More images than vLLM's own cache of processed media holds.
_MAX_GRIDS = 2**20
_STAND_IN = Image.new("RGB", (64, 64), "gray")


class VllmMedia:
    """The renderer of one engine."""

    def __init__(self, renderer: Any) -> None:
        self._renderer = renderer
        self._grids: dict[str, tuple[int, ...]] = {}

    async def render(
        self,
        token_ids: list[int],
        placeholders: Sequence[PlaceholderRange],
        media: Sequence[EngineMedia],
        *,
        with_tensors: bool = False,
    ) -> "EngineInput":
        """Run the model's processor. Images are known to vLLM's caches by their sha256, and by their options.

        With `placeholders`, `token_ids` are expanded already. `with_tensors`: keep those of every item in the result,
        also of items that the engine has in its cache. Raises InvalidRequest and ValueError.
        """
        if not media:
            return (await self._renderer.render_cmpl_async([{"prompt_token_ids": token_ids}]))[0]
        if placeholders or with_tensors or not all(item.is_plain for item in media):
            # The one thread in which vLLM's processor runs.
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._renderer._mm_executor,
                self._assemble,
                token_ids,
                placeholders,
                media,
            )
        prompt = {
            "prompt_token_ids": token_ids,
            "multi_modal_data": {"image": [item.content for item in media]},
            "multi_modal_uuids": {"image": [item.sha256.hex() for item in media]},
        }
        try:
            return (await self._renderer.render_cmpl_async([prompt]))[0]
        except AssertionError as error:  # vLLM's way to say that a placeholder is missing
            raise InvalidRequest("media", f"{len(media)} images came, the prompt has not room for all") from error

    def forget(self, media: Sequence[EngineMedia]) -> None:
        """Send these again next time: the request that should have brought them to the worker has failed.

        vLLM believes that a worker holds what has been processed for it once. For one that does hold it this costs a
        transfer.
        """
        cache = self._renderer.mm_processor_cache
        if cache is not None:
            for item in media:
                if item.is_plain:
                    with contextlib.suppress(RuntimeError):  # the engine is being stopped, and its thread has ended
                        self._renderer._mm_executor.submit(cache.invalidate, item.sha256.hex())

    def uses(self, engine_input: Any, media: Sequence[EngineMedia], *, with_tensors: bool) -> tuple[MediaUse, ...]:
        """What vLLM did with each item, in vLLM's own words: its hashes, placeholders and grids.

        Raises InvalidRequest unless each item has its place.
        """
        found = engine_input["type"] == "multimodal"
        hashes = engine_input["mm_hashes"]["image"] if found else []
        if len(hashes) != len(media):
            raise InvalidRequest("media", f"{len(media)} images came, the prompt has room for {len(hashes)}")
        if not found:
            return ()
        uses = []
        places, tensors = engine_input["mm_placeholders"]["image"], engine_input["mm_kwargs"]["image"]
        for digest, place, item, given in zip(hashes, places, tensors, media, strict=True):
            if item is not None and "image_grid_thw" in item:  # None: the worker has it in its cache
                self._grids[digest] = tuple(item["image_grid_thw"].data.flatten().tolist())
                if len(self._grids) > _MAX_GRIDS:
                    del self._grids[next(iter(self._grids))]
            uses.append(
                MediaUse(
                    # With options vLLM hashes them along; without, its name for the item is the one that was given.
                    sha256=bytes.fromhex(digest) if given.is_plain else given.sha256,
                    placeholder=PlaceholderRange(place.offset, place.length),
                    num_tokens=place.get_num_embeds(),
                    grid_thw=self._grids.get(digest, ()),
                    processed=_named_tensors(item) if with_tensors and item is not None else (),
                )
            )
        return tuple(uses)

    def _assemble(
        self, token_ids: list[int], placeholders: Sequence[PlaceholderRange], media: Sequence[EngineMedia]
    ) -> "EngineInput":
        from vllm.inputs import mm_input
        from vllm.utils.torch_utils import set_default_torch_num_threads

        processor = self._renderer.get_mm_processor()
        items, hashes, updates = [], [], []
        with set_default_torch_num_threads():
            for i, item in enumerate(media):
                kwargs, digest, update = self._process(processor, token_ids, item, f"media[{i}]")
                items.append(kwargs)
                hashes.append(digest)
                updates.append([processor._recompute_cached_prompt_update(each, i) for each in update])
            if placeholders:
                found = processor._find_mm_placeholders(token_ids, {"image": updates}).get("image", [])
                _check_placeholders(placeholders, found, updates)
            else:
                try:
                    token_ids, by_modality = processor._apply_prompt_updates(token_ids, {"image": updates})
                except AssertionError:  # as above
                    by_modality = {}
                found = by_modality.get("image", [])
                if len(found) != len(media):
                    raise InvalidRequest("media", f"{len(media)} images came, the prompt has room for {len(found)}")
        return mm_input(
            prompt_token_ids=token_ids,
            mm_kwargs={"image": items},
            mm_hashes={"image": hashes},
            mm_placeholders={"image": [place.to_range() for place in found]},
        )

    def _process(self, processor: Any, token_ids: list[int], item: EngineMedia, field: str) -> tuple[Any, str, Any]:
        """One item: tensors, name in vLLM's caches, and how the prompt is expanded for it."""
        from vllm.multimodal.processing.context import TimingContext
        from vllm.multimodal.processing.inputs import ProcessorInputs

        options = _options(processor, item, field)
        image = item.content if isinstance(item.content, Image.Image) else _STAND_IN
        data = processor.info.parse_mm_data({"image": [image]})
        if not isinstance(item.content, Image.Image):
            items = foreign_item(processor, item.content, _STAND_IN, f"{field}.processed.tensors")
            updates = processor._get_mm_prompt_updates(data, {}, items)
            return items["image"][0], item.sha256.hex(), updates["image"][0]
        inputs = ProcessorInputs(
            token_ids,
            data,
            {"image": [item.sha256.hex()]},
            hf_processor_mm_kwargs=options,
            cache=self._renderer._mm_processor_only_cache,
        )
        result = processor._cached_apply_hf_processor(inputs, TimingContext(enabled=False))
        return result.kwargs["image"][0], result.hashes["image"][0], result.prompt_updates["image"][0]


def _options(processor: Any, item: EngineMedia, field: str) -> dict[str, Any]:
    """Arguments of the model's processor for the bounds of one item. Raises Unimplemented where it has no such."""
    if item.min_pixels is None and item.max_pixels is None:
        return {}
    image_processor = getattr(processor.info.get_hf_processor(), "image_processor", None)
    known = getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", {})
    size: Any = getattr(image_processor, "size", {})
    if "min_pixels" not in known or "max_pixels" not in known:
        raise Unimplemented(f"{field}.processor", "the processor of this model does not resize by a number of pixels")
    low = item.min_pixels if item.min_pixels is not None else size["shortest_edge"]
    high = item.max_pixels if item.max_pixels is not None else size["longest_edge"]
    if low > high:
        name = "max_pixels" if item.min_pixels is None else "min_pixels"
        raise InvalidRequest(f"{field}.processor.{name}", f"makes the bounds {low} to {high} with the model's own")
    return {"size": {"shortest_edge": low, "longest_edge": high}}


def _check_placeholders(given: Sequence[PlaceholderRange], found: Sequence[Any], updates: Sequence[Any]) -> None:
    """Raises InvalidRequest unless each range that came is what the processor yields for its item."""
    expected = [PlaceholderRange(place.start_idx, place.length) for place in found]
    for i, run in enumerate(given):
        if i >= len(expected) or expected[i] != run:
            lengths = {len(content.content.full) for content in updates[i]}
            raise InvalidRequest(
                f"tokens.placeholders[{i}]",
                f"is {run.length} tokens at {run.offset}; the processor yields {max(lengths, default=0)} for media[{i}]"
                + (f", which are found at {expected[i].offset}" if i < len(expected) else ", which are not found"),
            )


def _named_tensors(item: Mapping[str, Any]) -> tuple[NamedTensor, ...]:
    """An item's tensors as a Hugging Face processor yields them for one image: with a dimension for it."""
    named = []
    for name in sorted(item):
        value = item[name].field.reduce_data([item[name]])
        if not isinstance(value, torch.Tensor) or value.dtype not in DTYPE_NAMES:
            raise Unimplemented("returns.processed_media", f"{name} of this model is no plain tensor")
        data = value.contiguous().flatten().view(torch.uint8).numpy()
        named.append(
            NamedTensor(name, Tensor(DTYPE_NAMES[value.dtype], tuple(value.shape), np.asarray(data).tobytes()))
        )
    return tuple(named)
