"""Tiny models of further families, which actors serve; built as those of `families`, and all of them together."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers

from tests.helpers import families
from tests.helpers.families import CLIP, MROPE, TEXT, qwen_ids, save, template, tokenizer_with


def smolvlm(directory: Path) -> None:
    ids, tokenizer = tokenizer_with("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={**CLIP, "image_size": 56},
        image_token_id=ids["<image>"],
        scale_factor=2,
        pad_token_id=256,
    )
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tokenizer,
        transformers.SmolVLMVideoProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 56}),
        image_seq_len=4,
        chat_template=template("<image>", "<video>"),
    )
    save(transformers.SmolVLMForConditionalGeneration(config), processor, directory)


def qwen3_vl_moe(directory: Path) -> None:
    """Qwen3-VL with 8 experts in each layer, of which a token uses 2."""
    ids, tokenizer = tokenizer_with("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    config = transformers.Qwen3VLMoeConfig(
        text_config={
            **TEXT,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
            "moe_intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,  # what transformers always does, and vLLM asks for
            "tie_word_embeddings": False,
        },
        vision_config=families.QWEN3_VISION,
        **qwen_ids(ids),
    )
    save(transformers.Qwen3VLMoeForConditionalGeneration(config), families.qwen3_processor(tokenizer), directory)
    # As it is published, and as vLLM takes it; transformers loads both.
    families.rewrite(
        directory, lambda name, value: (name, value.transpose(1, 2).contiguous() if ".mlp.experts." in name else value)
    )


SERVED_FAMILIES: Mapping[str, Callable[[Path], Any]] = {
    **families.FAMILIES,
    "qwen3_vl_moe": qwen3_vl_moe,
    "smolvlm": smolvlm,
}


def build(family: str, directory: Path) -> Path:
    """Write the family's checkpoint, the same every time."""
    return families.write(SERVED_FAMILIES[family], directory)
