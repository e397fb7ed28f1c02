"""Which tokens stand for media: generation masks them, and training leaves them out of the distribution alike."""

from typing import Any

# How the configs of the model families call the ids of their media placeholders.
_FIELDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")


def image_token_id(hf_config: Any) -> int | None:
    """Id of the token that stands for one embedding of an image; None for a model without images."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(value := getattr(hf_config, name, None), int):
            return value
    return None


def placeholder_ids(hf_config: Any) -> tuple[int, ...]:
    """Ids of the placeholder tokens, ascending, from a Hugging Face model config."""
    return tuple(sorted({value for name in _FIELDS if isinstance(value := getattr(hf_config, name, None), int)}))
