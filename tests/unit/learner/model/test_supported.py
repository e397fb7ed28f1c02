from typing import Any

import pytest
import torch
import transformers
from torch import nn

from learner.model.load import model_cost, prepare_policy
from learner.model.supported import check_supported
from tests.helpers.families import CLIP, TEXT


@pytest.mark.parametrize(
    ("family", "layer_types"),
    [("Qwen3_5", ["linear_attention", "full_attention"]), ("Lfm2Vl", ["conv", "full_attention"])],
)
def test_layers_that_carry_a_state_are_refused(family: str, layer_types: list[str]) -> None:
    config = getattr(transformers, f"{family}Config")(text_config={"layer_types": layer_types, "num_hidden_layers": 2})
    model = type("Hybrid", (nn.Module,), {"config": config})()
    with pytest.raises(ValueError, match=f"Hybrid has layers of type {layer_types[0]}, which would mix the sequences"):
        prepare_policy(model)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("Florence2", "is an encoder and a decoder"),
        ("T5Gemma2", "is an encoder and a decoder"),
        ("Mllama", "sees its images through layers of cross attention"),
        ("Ernie4_5_VLMoe", "sends images to experts of their own, by moe_mm_token_type_ids"),
    ],
)
def test_models_that_do_not_read_one_sequence_are_refused(family: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^{family}ForConditionalGeneration {reason}; packed batches are for"):
        check_supported(unbuilt(family))


@pytest.mark.parametrize("family", ["blip", "git", "idefics"])
def test_families_whose_text_model_has_another_name_are_refused(family: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(family))
    with pytest.raises(
        ValueError, match=r"^\w+ has neither of model\.language_model, model\.text_model; docs/models.md"
    ):
        model_cost(model)


def granite_in_llava(scaling: float) -> Any:
    """As Granite Vision 3 is made, at a small size."""
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    torch.manual_seed(0)
    config = transformers.LlavaNextConfig(
        text_config={"model_type": "granite", **text, "logits_scaling": scaling},
        vision_config={"model_type": "clip_vision_model", **CLIP, "projection_dim": 32},
        image_token_index=300,
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def test_a_forward_that_leaves_out_the_scaling_of_its_text_model_is_refused() -> None:
    """Actors divide the logits by it: a learner that does not would train at another temperature."""
    plain, scaled = granite_in_llava(1.0), granite_in_llava(8.0)
    check_supported(plain)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, scaled(input_ids=ids).logits)
    with pytest.raises(ValueError, match=r"LlavaNextForConditionalGeneration leaves out logits_scaling \(8\) of its"):
        check_supported(scaled)


def unbuilt(family: str, **settings: float) -> Any:
    """A family's class and configuration, without parameters. `settings`: of its text model."""
    config = getattr(transformers, f"{family}Config")()
    for name, value in settings.items():
        setattr(config.get_text_config(), name, value)
    model = object.__new__(getattr(transformers, f"{family}ForConditionalGeneration"))
    model.__dict__["config"] = config
    return model


@pytest.mark.parametrize("family", ["AyaVision", "Cohere2Vision"])
def test_families_that_leave_out_a_scaling_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match=rf"^{family}\w+ leaves out logit_scale \(4\) of its text model"):
        check_supported(unbuilt(family, logit_scale=4.0))


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("Granite4Vision", "logits_scaling"),
        ("HyperCLOVAXVisionV2", "logits_scaling"),
        ("Gemma4", "final_logit_softcapping"),
    ],
)
def test_families_that_apply_a_scaling_are_trained(family: str, setting: str) -> None:
    model = unbuilt(family, **{setting: 4.0})
    model.config.get_text_config().use_bidirectional_attention = None  # Gemma 4 would be refused for it
    check_supported(model)
