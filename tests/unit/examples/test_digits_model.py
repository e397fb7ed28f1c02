"""The tiny checkpoint, read back by transformers' own Auto classes."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.digits import data
from examples.digits.model import build_model, build_tokenizer

PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which digit?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("digits") / "model", seed=3)


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def batch(processor: Any) -> Any:
    scan = Image.open(io.BytesIO(data.png(0)))
    return processor(text=[PROMPT], images=[scan], return_tensors="pt")


def test_chat_template_renders_qwens_turns(processor: Any) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "Which digit?"}]
    messages = [{"role": "user", "content": content}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == PROMPT
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert processor.apply_chat_template(plain, add_generation_prompt=False) == turns


def test_a_scan_is_four_image_tokens(model: Any, batch: Any) -> None:
    # 56 / 14 = 4 patches a side, merged 2 x 2: 16 patches of 3 * 2 * 14 * 14 values, 4 tokens.
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert batch["pixel_values"].shape == (16, 1176)
    is_image = batch["input_ids"][0] == model.config.image_token_id
    assert is_image.nonzero().flatten().tolist() == [7, 8, 9, 10]
    assert batch["mm_token_type_ids"][0].tolist() == is_image.int().tolist()
    assert batch["input_ids"].shape == (1, 37)


def test_special_ids_agree(model: Any, processor: Any) -> None:
    tokenizer, config = processor.tokenizer, model.config
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|image_pad|>", "<|video_pad|>", "<|im_end|>")}
    assert processor.image_token_id == config.image_token_id == ids["<|image_pad|>"]
    assert processor.video_token_id == config.video_token_id == ids["<|video_pad|>"]
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == ids["<|im_end|>"]
    assert config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")


def test_the_image_reaches_the_logits(model: Any, batch: Any, processor: Any) -> None:
    other = processor(text=[PROMPT], images=[Image.open(io.BytesIO(data.png(1)))], return_tensors="pt")
    with torch.no_grad():
        difference = (model(**batch).logits - model(**other).logits).abs().amax(dim=-1)[0]
    assert difference[:7].max() == 0  # before the image
    assert difference[-1] > 1e-3


def test_seed_decides_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    first = load_file(checkpoint / "model.safetensors")
    same = load_file(build_model(tmp_path / "same", seed=3) / "model.safetensors")
    other = load_file(build_model(tmp_path / "other", seed=4) / "model.safetensors")
    assert sum(tensor.numel() for tensor in first.values()) == 635_328
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_every_id_decodes_and_text_survives() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == 320
    assert all(isinstance(token, str) for token in tokenizer.convert_ids_to_tokens(list(range(320))))
    for text in ("7", "a b\n", "größe 数字"):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode())  # one token for each byte
        assert tokenizer.decode(ids) == text
    seven = tokenizer.encode("7")
    assert tokenizer.decode([*seven, tokenizer.eos_token_id, 319], skip_special_tokens=True) == "7"
