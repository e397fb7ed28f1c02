"""Tiny models of further families, which actors serve; built as those of `tests.families`, and all of them together."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers

from tests import families
from tests.families import CLIP, MROPE, QWEN_IMAGE, QWEN_VIDEO, TEXT, qwen_ids, save, template, tokenizer_with


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


def minicpm_v(directory: Path) -> None:
    """MiniCPM-V 4.6 with the text model that vLLM takes, but without its layers of linear attention.

    These compute in bfloat16 only in vLLM on CPUs.
    """
    tokens = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    ids, tokenizer = tokenizer_with(*tokens.values())
    tokenizer = families.with_tokens(tokenizer, **tokens)
    config = transformers.MiniCPMV4_6Config(
        text_config={
            "model_type": "qwen3_5_text",
            **TEXT,
            "layer_types": ["full_attention", "full_attention"],
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        },
        vision_config={**CLIP, "num_hidden_layers": 3, "image_size": 112},
        insert_layer_id=1,
        image_size=112,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )
    processor = transformers.MiniCPMV4_6Processor(
        transformers.MiniCPMV4_6ImageProcessor(scale_resolution=112, max_slice_nums=4),
        transformers.MiniCPMV4_6VideoProcessor(scale_resolution=112, max_slice_nums=1),
        tokenizer,
        chat_template=template("<|image_pad|>", "<|video_pad|>"),
    )
    save(transformers.MiniCPMV4_6ForConditionalGeneration(config), processor, directory)


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
    pixels: dict[str, Any] = {"patch_size": 16, "size": {"shortest_edge": 64 * 64, "longest_edge": 4 * 64 * 64}}
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(**pixels),
        chat_template=template(QWEN_IMAGE, QWEN_VIDEO),
    )
    save(transformers.Qwen3VLMoeForConditionalGeneration(config), processor, directory)
    # As it is published, and as vLLM takes it; transformers loads both.
    families.rewrite(
        directory, lambda name, value: (name, value.transpose(1, 2).contiguous() if ".mlp.experts." in name else value)
    )


SERVED_FAMILIES: Mapping[str, Callable[[Path], Any]] = {
    **families.FAMILIES,
    "qwen3_vl_moe": qwen3_vl_moe,
    "smolvlm": smolvlm,
    "minicpm_v": minicpm_v,
}


def build(family: str, directory: Path) -> Path:
    """Write the family's checkpoint, the same every time."""
    return families.write(SERVED_FAMILIES[family], directory)
