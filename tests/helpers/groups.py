"""Groups with made-up completions on real prompts; as reference transformers' own forward, one sequence at a time."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.types import (
    ChatMessage,
    Completion,
    FinishReason,
    FloatArray,
    MediaPart,
    PromptInfo,
    TextPart,
    VersionSpan,
)
from learner.batch.processing import PromptProcessor
from learner.types import Group, PromptSample

IMAGE_PAD = 262
SUPPRESSED = (262, 263)


def image_bytes(seed: int, width: int = 56, height: int = 56) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def sample(row: int, text: str, images: Sequence[bytes] = ()) -> PromptSample:
    """One user message: the images, then the text."""
    parts: tuple[TextPart | MediaPart, ...] = (*map(MediaPart, range(len(images))), TextPart(text))
    return PromptSample(row, (ChatMessage("user", parts),), tuple(images), ground_truth="")


def group(
    processor: PromptProcessor, prompt: PromptSample, lengths: Sequence[int], *, seed: int = 0, version: int = 0
) -> Group:
    """A group with random completions of the given lengths, random logprobs and rewards."""
    rng = np.random.default_rng(seed)
    processed = processor.process(prompt)
    completions = tuple(
        Completion(
            f"{prompt.row}/{index}",
            index,
            rng.integers(0, 256, length).astype(np.int32),
            (-5 * rng.random(length)).astype(np.float32),
            FinishReason.STOP,
            (VersionSpan(version, 0, length),),
        )
        for index, length in enumerate(lengths)
    )
    info = PromptInfo(f"g{prompt.row}", "actor", processed.input_ids, processed.input_ids)
    rewards = rng.random(len(lengths)).astype(np.float32)
    return Group(f"g{prompt.row}", prompt.row, prompt, processed, info, completions, rewards)


def mixed_groups(processor: PromptProcessor) -> list[Group]:
    """Images of several sizes, two images in one prompt, text only; ragged completions."""
    prompts = [
        sample(0, "what is this?", [image_bytes(1)]),
        sample(1, "no image here, only words"),
        sample(2, "compare", [image_bytes(2, 112, 56), image_bytes(3)]),
        sample(3, "?", [image_bytes(4, 56, 84)]),
    ]
    lengths = [(2, 5, 1), (4, 4), (7, 1, 3, 2), (1, 1)]
    return [group(processor, prompt, n, seed=prompt.row) for prompt, n in zip(prompts, lengths, strict=True)]


def centred(groups: Sequence[Group]) -> list[FloatArray]:
    """Advantages: reward minus the group's mean."""
    return [g.rewards - g.rewards.mean() for g in groups]


def reference_logits(model: Any, processor: Any, g: Group, completion: Completion) -> Tensor:
    """Logits `[n, V]` that predict the completion's tokens: transformers on prompt + completion, unpadded, alone."""
    completion_ids = torch.from_numpy(completion.token_ids).long()
    ids = torch.cat([torch.from_numpy(g.processed.input_ids).long(), completion_ids])
    arguments: dict[str, Tensor] = {}
    if g.sample.images:
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in g.sample.images]
        text = processor.apply_chat_template(conversation(g.sample), tokenize=False, add_generation_prompt=True)
        output = processor(text=[text], images=images, return_tensors="pt")
        types = torch.nn.functional.pad(output["mm_token_type_ids"], (0, len(completion_ids)))
        arguments = {
            "pixel_values": output["pixel_values"],
            "image_grid_thw": output["image_grid_thw"],
            "mm_token_type_ids": types,
        }
        assert torch.equal(output["input_ids"][0], ids[: len(ids) - len(completion_ids)])
    logits: Tensor = model(input_ids=ids[None], use_cache=False, **arguments).logits[0]
    return logits[-len(completion_ids) - 1 : -1]


def reference_logprobs(model: Any, processor: Any, groups: Sequence[Group]) -> list[list[Tensor]]:
    """For each group and completion, log_softmax at its tokens, by `reference_logits`."""
    return [
        [
            torch.log_softmax(reference_logits(model, processor, g, c).float(), -1)
            .gather(1, torch.from_numpy(c.token_ids).long()[:, None])
            .squeeze(1)
            for c in g.completions
        ]
        for g in groups
    ]


def conversation(prompt: PromptSample) -> list[dict[str, Any]]:
    """The messages as a chat template takes them."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                for part in message.parts
            ],
        }
        for message in prompt.messages
    ]
