"""Which models can be trained: the others are refused by name, before they would train wrongly without a word."""

import inspect
from typing import Any

# What some models do with the output layer's logits, by the names of the settings of the text model.
_LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")

# What `learner.model.attention` computes.
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Families whose prompt sees itself in both directions, without a setting that says so.
_PREFIX_FAMILIES = frozenset({"colpali", "paligemma"})
# An argument of forward that chooses the experts of a token, and that packs do not carry.
_EXPERT_CHOICE = "moe_mm_token_type_ids"


def logit_settings(config: Any) -> dict[str, float]:
    """How a model with this configuration scales or caps the logits of its output layer; empty: not at all."""
    found = {name: getattr(config.get_text_config(), name, None) for name in _LOGIT_SETTINGS}
    return {name: value for name, value in found.items() if value not in (None, 1)}


def check_supported(model: Any) -> None:
    """Raise ValueError for a model of transformers that a packed batch, or its own forward, would train wrongly."""
    _check_architecture(model)
    _check_attention(model)
    _check_logits(model)


def _check_architecture(model: Any) -> None:
    """A prompt elsewhere than in front of its completion is not packed with it."""
    what = None
    if model.config.is_encoder_decoder:
        what = "is an encoder and a decoder"
    elif getattr(model.config.get_text_config(), "cross_attention_layers", None):
        what = "sees its images through layers of cross attention"
    elif _EXPERT_CHOICE in inspect.signature(type(model).forward).parameters:
        what = f"sends images to experts of their own, by {_EXPERT_CHOICE}"
    if what is not None:
        raise ValueError(
            f"{type(model).__name__} {what}; packed batches are for models that read text and images as one sequence"
        )


def _check_attention(model: Any) -> None:
    """Other layers carry a state from token to token, over the ends of the sequences of a pack, or look ahead."""
    text_config = model.config.get_text_config()
    if getattr(text_config, "use_bidirectional_attention", None) or model.config.model_type in _PREFIX_FAMILIES:
        raise ValueError(
            f"{type(model).__name__} lets tokens of the prompt see those that come later, which the attention over a "
            "packed batch does not"
        )
    layer_types = set(getattr(text_config, "layer_types", None) or ())
    if unknown := sorted(layer_types - _LAYER_TYPES):
        raise ValueError(
            f"{type(model).__name__} has layers of type {', '.join(unknown)}, which would mix the sequences of a "
            f"packed batch; there are {', '.join(sorted(_LAYER_TYPES))}"
        )


def _check_logits(model: Any) -> None:
    """The forward of a vision-language model may leave out what its text model, alone or in vLLM, does with logits.

    It computes logits itself, from the text model's hidden states; whether it knows a setting, its source says.
    """
    source = inspect.getsource(type(model).forward)
    for name, value in logit_settings(model.config).items():
        if name not in source:
            raise ValueError(
                f"{type(model).__name__} leaves out {name} ({value:g}) of its text model, which actors apply: what is "
                "trained would not be what was sampled"
            )
