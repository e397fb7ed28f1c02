"""From ids and decoded media to what vLLM's engine takes, and back to what was done with each item.

Prompts in vLLM's own form (unexpanded ids, images and videos, the model's own options) go through its renderer as they
are. The others are put together here, item by item, by the same multimodal processor: prompts that come expanded are
held against what the processor yields, tensors that come processed against what it would have yielded. Such requests
carry their tensors to the engine every time: they take part in the cache of processed items, but in none that lies in
two processes and must agree.
"""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actor.engine import EngineMedia
from actor.engine_vllm.foreign_tensors import GRIDS, foreign_item, stand_in, yielded
from actor.engine_vllm.videos import Pace, vllm_item
from common.dtypes import DTYPE_NAMES
from common.errors import InvalidRequest, Unimplemented
from common.media.resizing import resize_options
from common.tensors import NamedTensor, Tensor
from common.types import MediaUse, Modality, PlaceholderRange

if TYPE_CHECKING:
    from vllm.inputs import EngineInput

# More items than vLLM's own cache of processed media holds.
_MAX_GRIDS = 2**20


class VllmMedia:
    """The renderer of one engine."""

    def __init__(self, renderer: Any, max_context_tokens: int) -> None:
        self._renderer = renderer
        self._grids: dict[str, tuple[int, ...]] = {}
        self._yielded: dict[Modality, dict[str, Any]] = {}
        processor = renderer.get_mm_processor() if renderer.mm_processor is not None else None
        self._pace = Pace(processor, max_context_tokens)
        self.takes_videos = processor is not None and "video" in processor.info.get_supported_mm_limits()

    def image_text(self) -> str:
        """How the text of a prompt says where an image is."""
        return str(self._renderer.get_mm_processor().dummy_inputs.get_dummy_text({"image": 1}))

    async def render(
        self,
        token_ids: list[int],
        placeholders: Sequence[PlaceholderRange],
        media: Sequence[EngineMedia],
        *,
        with_tensors: bool = False,
    ) -> "EngineInput":
        """Run the model's processor. Items are known to vLLM's caches by their names, and by their options.

        With `placeholders`, `token_ids` are expanded already. `with_tensors`: keep those of every item in the result,
        also of items that the engine has in its cache. Raises InvalidRequest and ValueError.
        """
        if not media:
            return (await self._renderer.render_cmpl_async([{"prompt_token_ids": token_ids}]))[0]
        self._pace.check_given(media)
        if not (placeholders or with_tensors) and all(item.is_plain for item in media):
            prompt = {
                "prompt_token_ids": token_ids,
                "multi_modal_data": _by_modality(media, map(vllm_item, media)),
                "multi_modal_uuids": _by_modality(media, (item.name for item in media)),
            }
            # vLLM's way to say that a placeholder is missing, or that an item has left its cache under this request,
            # with one that failed: the other way names the first, and does without that cache.
            with contextlib.suppress(AssertionError):
                return (await self._renderer.render_cmpl_async([prompt]))[0]
        # The one thread in which vLLM's processor runs.
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._renderer._mm_executor,
            self._assemble,
            token_ids,
            placeholders,
            media,
        )

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
                        self._renderer._mm_executor.submit(cache.invalidate, item.name)

    def is_known(self, engine_input: Any) -> bool:
        """Whether each item has come with its tensors, now or before.

        If not, the request that should have brought them was cancelled or failed on its way. The worker lacks the item
        then, and `uses` cannot say what was done with it: `render` it `with_tensors`.
        """
        if engine_input["type"] != "multimodal":
            return True
        return all(
            item is not None or digest in self._grids
            for modality, items in engine_input["mm_kwargs"].items()
            for item, digest in zip(items, engine_input["mm_hashes"][modality], strict=True)
        )

    def by_name(self, engine_input: Any) -> Any:
        """The same for an engine process that has had these items: without tensors, if it keeps them.

        It may have dropped them since: such a request ends before its first token.
        """
        from vllm.multimodal.cache import LruKeyReplicatedSenderCache

        has_twin = isinstance(self._renderer.mm_processor_cache, LruKeyReplicatedSenderCache)
        if engine_input["type"] != "multimodal" or not has_twin:
            return engine_input
        items = {modality: [None] * len(items) for modality, items in engine_input["mm_kwargs"].items()}
        return {**engine_input, "mm_kwargs": items}

    def uses(self, engine_input: Any, media: Sequence[EngineMedia], *, with_tensors: bool) -> tuple[MediaUse, ...]:
        """What vLLM did with each item, in vLLM's own words: its hashes, placeholders and grids.

        Raises InvalidRequest unless each item has its place.
        """
        found = engine_input["type"] == "multimodal"
        left = {}
        for modality in Modality:
            same = [item for item in media if item.modality is modality]
            hashes = engine_input["mm_hashes"].get(modality.value, ()) if found else ()
            if len(hashes) != len(same):
                raise InvalidRequest(
                    "media", f"{len(same)} {modality.value}s came, the prompt has room for {len(hashes)}"
                )
            if same:
                places, tensors = (engine_input[key][modality.value] for key in ("mm_placeholders", "mm_kwargs"))
                left[modality] = zip(hashes, places, tensors, strict=True)
        uses = []
        for given in media:
            digest, place, item = next(left[given.modality])
            name = GRIDS[given.modality]
            if item is not None:  # None: the worker has it in its cache
                self._grids[digest] = tuple(item[name].data.flatten().tolist()) if name in item else ()
                if len(self._grids) > _MAX_GRIDS:
                    del self._grids[next(iter(self._grids))]
            uses.append(
                MediaUse(
                    # With options vLLM hashes them along; without, its name for the item is the one that was given.
                    sha256=bytes.fromhex(digest[:64]) if given.is_plain else given.sha256,
                    placeholder=PlaceholderRange(place.offset, place.length),
                    num_tokens=place.get_num_embeds(),
                    grid_thw=self._grids[digest],
                    modality=given.modality,
                    processed=_named_tensors(item) if with_tensors and item is not None else (),
                )
            )
        self._pace.check_span(media, [use.grid_thw for use in uses])
        return tuple(uses)

    def _assemble(
        self, token_ids: list[int], placeholders: Sequence[PlaceholderRange], media: Sequence[EngineMedia]
    ) -> "EngineInput":
        from vllm.inputs import mm_input
        from vllm.utils.torch_utils import set_default_torch_num_threads

        processor = self._renderer.get_mm_processor()
        items, hashes, updates = [], [], []
        counts = dict.fromkeys(Modality, 0)
        with set_default_torch_num_threads():
            for i, item in enumerate(media):
                kwargs, digest, update = self._process(processor, token_ids, item, f"media[{i}]")
                items.append(kwargs)
                hashes.append(digest)
                index = counts[item.modality]
                updates.append([processor._recompute_cached_prompt_update(each, index) for each in update])
                counts[item.modality] += 1
            if placeholders:
                found = processor._find_mm_placeholders(token_ids, _by_modality(media, updates))
                _check_placeholders(placeholders, media, found, updates)
            else:
                try:
                    token_ids, found = processor._apply_prompt_updates(token_ids, _by_modality(media, updates))
                except AssertionError:  # as above
                    found = {}
                for modality, count in counts.items():
                    room = len(found.get(modality.value, ()))
                    if room != count:
                        raise InvalidRequest("media", f"{count} {modality.value}s came, the prompt has room for {room}")
        return mm_input(
            prompt_token_ids=token_ids,
            mm_kwargs=_by_modality(media, items),
            mm_hashes=_by_modality(media, hashes),
            mm_placeholders={name: [place.to_range() for place in places] for name, places in found.items()},
        )

    def _process(self, processor: Any, token_ids: list[int], item: EngineMedia, field: str) -> tuple[Any, str, Any]:
        """One item: tensors, name in vLLM's caches, and how the prompt is expanded for it."""
        from vllm.multimodal.processing.context import TimingContext
        from vllm.multimodal.processing.inputs import ProcessorInputs

        modality = item.modality.value
        options = resize_options(
            processor.info.get_hf_processor(), item.modality, item.min_pixels, item.max_pixels, f"{field}.processor"
        )
        if isinstance(item.content, tuple):
            data = processor.info.parse_mm_data({modality: [stand_in(item.modality)]})
            if item.modality not in self._yielded:
                self._yielded[item.modality] = yielded(processor, item.modality)
            expected = self._yielded[item.modality]
            items = foreign_item(processor, expected, item.content, item.modality, f"{field}.processed.tensors")
            updates = processor._get_mm_prompt_updates(data, {}, items)
            return items[modality][0], item.name, updates[modality][0]
        inputs = ProcessorInputs(
            token_ids,
            processor.info.parse_mm_data({modality: [vllm_item(item)]}),
            {modality: [item.name]},
            hf_processor_mm_kwargs=options,
            cache=self._renderer._mm_processor_only_cache,
        )
        result = processor._cached_apply_hf_processor(inputs, TimingContext(enabled=False))
        return result.kwargs[modality][0], result.hashes[modality][0], result.prompt_updates[modality][0]


def _by_modality(media: Sequence[EngineMedia], values: Iterable[Any]) -> dict[str, list[Any]]:
    """One value for each item, in vLLM's form: lists by the name of the modality."""
    lists: dict[str, list[Any]] = {}
    for item, value in zip(media, values, strict=True):
        lists.setdefault(item.modality.value, []).append(value)
    return lists


def _check_placeholders(
    given: Sequence[PlaceholderRange],
    media: Sequence[EngineMedia],
    found: Mapping[str, Sequence[Any]],
    updates: Sequence[Any],
) -> None:
    """Raises InvalidRequest unless each range that came is what the processor yields for its item."""
    left = {name: iter(places) for name, places in found.items()}
    for i, (run, item) in enumerate(zip(given, media, strict=True)):
        place = next(left.get(item.modality.value, iter(())), None)
        if place is None or PlaceholderRange(place.start_idx, place.length) != run:
            lengths = {len(content.content.full) for content in updates[i]}
            raise InvalidRequest(
                f"tokens.placeholders[{i}]",
                f"is {run.length} tokens at {run.offset}; the processor yields {max(lengths, default=0)} for media[{i}]"
                + (", which are not found" if place is None else f", which are found at {place.start_idx}"),
            )


def _named_tensors(item: Mapping[str, Any]) -> tuple[NamedTensor, ...]:
    """An item's tensors as a Hugging Face processor yields them for it alone: with a dimension for it."""
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
