"""Where the parts of a vision-language model are, by the names that transformers gives them. A family is named here."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from learner.config.model import Part

# The embeddings of text and media go through it; it is a child of `model`.
_TEXT_MODEL = ("language_model", "text_model")

# A projector may be inside its tower.
NAMES: Mapping[Part, tuple[str, ...]] = {
    "vision_tower": ("visual", "vision_tower", "vision_model", "vision_encoder"),
    "projector": ("multi_modal_projector", "merger", "deepstack_merger_list", "connector", "aligner"),
    "language_model": (*_TEXT_MODEL, "lm_head"),
}


def find_modules(model: nn.Module, part: Part) -> list[str]:
    """Full names of the modules that are a part of a model; the outermost ones."""
    found: list[str] = []
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] in NAMES[part] and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def text_model(model: Any) -> nn.Module:
    """What the embeddings of text and media go through.

    Raises:
        ValueError: the model has none by a name that is known here.
    """
    inner = getattr(model, "model", None)
    for name in _TEXT_MODEL:
        if isinstance(found := getattr(inner, name, None), nn.Module):
            return found
    raise ValueError(
        f"{type(model).__name__} has neither of {', '.join(f'model.{name}' for name in _TEXT_MODEL)}; docs/models.md "
        "says which families can be trained"
    )


def vision_parts(model: Any) -> list[str]:
    """What an image passes before the text model: modules, and parameters of the model's own (a LLaVA's newline)."""
    inner = model.model
    names = [name for name, _ in (*inner.named_children(), *inner.named_parameters(recurse=False))]
    return [f"model.{name}" for name in names if name not in _TEXT_MODEL]
