"""Videos as vLLM takes them, and what a model that places frames in time makes of their pace."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from actor.engine import EngineMedia
from common.errors import InvalidRequest

# What a processor that asks for the pace is told where it makes no difference.
_ANY_PACE = 1.0


def vllm_item(item: EngineMedia) -> Any:
    """One decoded image, or one video with the facts that models ask for. Every frame that came is used."""
    if not isinstance(item.content, np.ndarray):
        return item.content
    num_frames, pace = len(item.content), item.frames_per_second or _ANY_PACE
    return item.content, {
        "fps": pace,
        "duration": num_frames / pace,
        "total_num_frames": num_frames,
        "frames_indices": list(range(num_frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


class Pace:
    """Checks on the frames per second of videos, for one model."""

    def __init__(self, processor: Any, max_context_tokens: int) -> None:
        """`processor`: vLLM's, None for a model without media."""
        self._is_needed = bool(getattr(getattr(processor, "data_parser", None), "video_needs_metadata", False))
        vision: Any = getattr(processor.info.get_hf_config(), "vision_config", None) if processor is not None else None
        # Positions that one second takes (Qwen2.5-VL); 0 for models whose positions do not depend on time.
        self._positions_per_second = getattr(vision, "tokens_per_second", 0) or 0
        self._frames_per_patch = getattr(vision, "temporal_patch_size", 1)
        self._max_positions = max_context_tokens

    def check_given(self, media: Sequence[EngineMedia]) -> None:
        """Raises InvalidRequest where a pace is missing that the model needs."""
        for i, item in enumerate(media):
            if isinstance(item.content, np.ndarray) and self._is_needed and item.frames_per_second is None:
                raise InvalidRequest(f"media[{i}].frames_per_second", "is missing; this model places frames in time")

    def check_span(self, media: Sequence[EngineMedia], grids: Sequence[tuple[int, ...]]) -> None:
        """Raises InvalidRequest for videos so slow that their positions leave the model's table of positions.

        The engine would die of them. `grids` are those of the items: time, height, width.
        """
        if not self._positions_per_second:
            return
        num_positions = 0.0
        for i, (item, grid) in enumerate(zip(media, grids, strict=True)):
            field, seconds = f"media[{i}].frames_per_second", 0.0
            if item.frames_per_second is not None:
                seconds = self._frames_per_patch / item.frames_per_second
            elif isinstance(item.content, tuple):
                for j, named in enumerate(item.content):
                    if named.name == "second_per_grid_ts":
                        field = f"media[{i}].processed.tensors[{j}].tensor.data"
                        seconds = float(named.tensor.widened().item())
            num_positions += grid[0] * seconds * self._positions_per_second if grid else 0.0
            if num_positions > self._max_positions:
                raise InvalidRequest(
                    field, f"makes the videos take {num_positions:.0f} positions; the context has {self._max_positions}"
                )
