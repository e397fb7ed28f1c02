"""Tiny models of the families that the learner trains, each a complete checkpoint directory with its processor.

Random weights, byte-level tokenizer, two decoder layers: everything that differs between the families (positions, image
attention, projectors, media tensors) is transformers' own code at a small size.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common import torchvision_ops
from examples.digits.model import build_model as build_qwen2_5_vl

torchvision_ops.install()

import transformers  # noqa: E402 - its models import torchvision, which has just been repaired

VOCAB_SIZE = 320
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 256,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.15,
}
QWEN3_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 128,
    "num_heads": 2,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
    "initializer_range": 0.15,
}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
_QWEN_PIXELS: dict[str, Any] = {"size": {"shortest_edge": 56 * 56, "longest_edge": 4 * 56 * 56}}


def qwen2_vl(directory: Path) -> None:
    ids, tokenizer = tokenizer_with("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 128,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 0.15,
        },
        **qwen_ids(ids),
    )
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**_QWEN_PIXELS),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**_QWEN_PIXELS),
        chat_template=template(QWEN_IMAGE, QWEN_VIDEO),
    )
    save(transformers.Qwen2VLForConditionalGeneration(config), processor, directory)


def qwen3_processor(tokenizer: Any) -> Any:
    """Of Qwen3-VL, with experts or without."""
    pixels: dict[str, Any] = {"patch_size": 16, "size": {"shortest_edge": 64 * 64, "longest_edge": 4 * 64 * 64}}
    return transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(**pixels),
        chat_template=template(QWEN_IMAGE, QWEN_VIDEO),
    )


def qwen3_vl(directory: Path) -> None:
    ids, tokenizer = tokenizer_with("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config=QWEN3_VISION,
        **qwen_ids(ids),
    )
    save(transformers.Qwen3VLForConditionalGeneration(config), qwen3_processor(tokenizer), directory)


def llava_onevision(directory: Path) -> None:
    ids, tokenizer = tokenizer_with("<image>", "<video>")
    config = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[28, 28], [28, 56], [56, 28]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(
            size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 28], [28, 56], [56, 28]]
        ),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size={"height": 28, "width": 28}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=template("<image>", "<video>"),
    )
    save(transformers.LlavaOnevisionForConditionalGeneration(config), processor, directory)
    _name_tower_as_published(directory)


def llava_next(directory: Path) -> None:
    ids, tokenizer = tokenizer_with("<image>")
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = transformers.LlavaNextConfig(
        text_config={"model_type": "llama", **TEXT, "num_key_value_heads": 1},
        vision_config={"model_type": "clip_vision_model", **CLIP, "projection_dim": 32},
        image_token_index=ids["<image>"],
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    save(transformers.LlavaNextForConditionalGeneration(config), processor, directory)
    _name_tower_as_published(directory)


def gemma3(directory: Path) -> None:
    newlines = ["\n" * count for count in range(1, 5)]  # vLLM looks for them: an image lies between two of "\n\n"
    ids, tokenizer = tokenizer_with("<start_of_image>", "<end_of_image>", "<image_soft_token>", *newlines)
    config = transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={"model_type": "siglip_vision_model", **CLIP, "image_size": 56, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        with_tokens(
            tokenizer, boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
        ),
        image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.15)  # zeros by default
    save(model, processor, directory)
    _name_tower_as_published(directory)


def idefics3(directory: Path) -> None:
    ids, tokenizer = tokenizer_with("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **TEXT, "tie_word_embeddings": True},
        vision_config={**CLIP, "image_size": 56},
        image_token_id=ids["<image>"],
        scale_factor=2,
        pad_token_id=256,
        tie_word_embeddings=True,
    )
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tokenizer,
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    save(transformers.Idefics3ForConditionalGeneration(config), processor, directory)


def internvl(directory: Path) -> None:
    tokens = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    ids, tokenizer = tokenizer_with(*tokens)
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={**CLIP, "image_size": [28, 28], "patch_size": [7, 7], "norm_type": "layer_norm"},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=2),
        with_tokens(
            tokenizer,
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        transformers.InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>", "<video>"),
    )
    save(transformers.InternVLForConditionalGeneration(config), processor, directory)


def minicpm_v(directory: Path) -> None:
    """MiniCPM-V 4.6, the first that transformers has a class for, without its layers of linear attention.

    A pack cannot hold these, and vLLM computes them on CPUs in bfloat16 only.
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
    tokenizer = with_tokens(tokenizer, **tokens)
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
        chat_template=template(" <|image_pad|>\\n", "<|video_pad|>"),
    )
    save(transformers.MiniCPMV4_6ForConditionalGeneration(config), processor, directory)


FAMILIES: Mapping[str, Callable[[Path], Any]] = {
    "qwen2_5_vl": lambda directory: build_qwen2_5_vl(directory, seed=0),
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "llava_onevision": llava_onevision,
    "llava_next": llava_next,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "internvl": internvl,
    "minicpm_v": minicpm_v,
}


def build(family: str, directory: Path) -> Path:
    """Write the family's checkpoint, the same every time."""
    return write(FAMILIES[family], directory)


def write(make: Callable[[Path], Any], directory: Path) -> Path:
    """Have a checkpoint made, the same every time."""
    directory.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make(directory)
    return directory


def tokenizer_with(*special: str) -> tuple[dict[str, int], Any]:
    """Ids 0 to 255 are bytes, then come the special tokens; and the ids of the latter."""
    tokens = ("<|begin|>", "<|end|>", "<|turn|>", *special)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_{index}|>" for index in range(VOCAB_SIZE - 256 - len(tokens))]
    tokenizer.add_special_tokens([*tokens, *reserved])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|begin|>", model_max_length=2048
    )
    return {token: 256 + index for index, token in enumerate(tokens)}, fast


def with_tokens(tokenizer: Any, **tokens: str) -> Any:
    """The tokenizer with named special tokens, which some processors ask for as attributes."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|end|>",
        pad_token="<|begin|>",
        model_max_length=2048,
        extra_special_tokens=tokens,
    )


def template(image: str, video: str = "") -> str:
    return (
        "{% for message in messages %}<|turn|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% elif part['type'] == 'video' %}" + video + ""
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )


def qwen_ids(ids: dict[str, int]) -> dict[str, int]:
    return {
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
    }


def save(model: Any, processor: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def _name_tower_as_published(directory: Path) -> None:
    """Checkpoints of these families were written before transformers took one level out of its vision towers.

    transformers saves a model under the names that it was loaded from, so a new one lacks that level.
    """
    rewrite(directory, lambda name, value: (name.replace("vision_tower.", "vision_tower.vision_model."), value))


def rewrite(directory: Path, change: Callable[[str, Any], tuple[str, Any]]) -> None:
    """Give the tensors of a checkpoint other names or values."""
    path = directory / "model.safetensors"
    tensors = dict(change(name, value) for name, value in load_file(path).items())
    save_file(tensors, path, metadata={"format": "pt"})
