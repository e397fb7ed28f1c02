"""Nothing random is left in a policy: actors have no dropout, and what is trained must be what was sampled."""

from typing import Any

import pytest
import torch

from common import torchvision_ops
from learner.model.load import _remove_dropout
from learner.model.parts import text_model
from learner.model.supported import check_supported

torchvision_ops.install()

import transformers  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES  # noqa: E402


def _class_of(model_type: str) -> Any:
    names = CLASSES[model_type]
    return getattr(transformers, names if isinstance(names, str) else names[0])


def _set_rates(config: Any, rate: float) -> None:
    """Of the configuration and all its parts: whatever is a number and has "drop" in its name."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _set_rates(value, rate)
        elif "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, rate)


def _small(config: Any) -> Any:
    for part in (config.get_text_config(), getattr(config, "vision_config", None)):
        for name in ("num_hidden_layers", "depth"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, 2)
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:2]
    return config


def _build(model_type: str) -> Any:
    """Without weights; None for what cannot be built from its defaults, or cannot train."""
    model_class = _class_of(model_type)
    try:
        config = _small(model_class.config_class())
        _set_rates(config, 0.5)
        with torch.device("meta"):
            model = model_class(config)
        check_supported(model)
        text_model(model)
    except Exception:  # noqa: BLE001 - whatever a configuration without a checkpoint lacks
        return None
    return model


def test_no_family_keeps_a_rate() -> None:
    num_models, left = 0, []
    for model_type in sorted(CLASSES):
        model = _build(model_type)
        if model is None:
            continue
        num_models += 1
        _remove_dropout(model.train())
        for module in model.modules():
            left += [f"{type(module).__name__}.{name}" for name, value in vars(module).items() if value == 0.5]
    assert num_models > 30
    assert not left


@pytest.mark.skipif("qianfan_ocr" not in CLASSES, reason="this transformers does not have the family")
def test_stochastic_depth_is_removed() -> None:
    """Its rate is neither of attention nor that of a Dropout."""
    model = _build("qianfan_ocr")
    assert [module for module in model.modules() if getattr(module, "drop_prob", 0.0)]
    _remove_dropout(model)
    assert not [module for module in model.modules() if getattr(module, "drop_prob", 0.0)]
