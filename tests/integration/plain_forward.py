"""A family in stock transformers, one sequence at a time: what everything else is held against."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from learner.types import PromptSample
from tests.helpers.groups import conversation


def plain_model(directory: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager").train()


def prompt_inputs(processor: Any, prompt: PromptSample) -> dict[str, Tensor]:
    """The model's inputs for a prompt, by the family's own processor."""
    images = {"images": [Image.open(io.BytesIO(data)).convert("RGB") for data in prompt.images]}
    text = processor.apply_chat_template(conversation(prompt), tokenize=False, add_generation_prompt=True)
    return dict(processor(text=[text], return_tensors="pt", **(images if prompt.images else {})))


def continued(inputs: dict[str, Tensor], completion: Any) -> dict[str, Tensor]:
    """Inputs of a prompt with a completion behind it."""
    output = dict(inputs)
    output["input_ids"] = torch.cat([output["input_ids"], torch.from_numpy(completion).long()[None]], 1)
    output["attention_mask"] = torch.ones_like(output["input_ids"])
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in output:
            output[name] = torch.nn.functional.pad(output[name], (0, len(completion)))
    return output


def distribution(logits: Tensor, chosen: Any, suppressed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logprobs of the chosen tokens, and entropies, without the suppressed ids."""
    kept = [i for i in range(logits.shape[1]) if i not in suppressed]
    logprobs = torch.log_softmax(logits[:, kept].float(), -1)
    places = torch.tensor([kept.index(token) for token in np.asarray(chosen).tolist()])
    return logprobs.gather(1, places[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(1)
