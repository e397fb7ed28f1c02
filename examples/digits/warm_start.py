"""A short supervised start, so that reinforcement learning meets a policy that answers in form, and mostly wrongly.

First the form: any digit, all equally likely, then the end of the turn. Then the labels, until the policy reads about a
third of the training scans: by then each digit is sampled often enough to be rewarded, and most of the reading is still
to be learned.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.digits import data
from examples.digits.model import TOKEN_IDS

BATCH_SIZE = 32
NUM_FORM_STEPS = 12
FORM_LR = 2e-3
LABEL_LR = 5e-4
MAX_LABEL_STEPS = 200
# Training scans on which the accuracy is measured, and the steps with labels from one measurement to the next.
NUM_PROBES = 128
PROBE_EVERY = 2


class DigitReader:
    """The model with the demo's one prompt around each scan."""

    def __init__(self, model_dir: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(model_dir)
        self._processor = AutoProcessor.from_pretrained(model_dir)
        content = [{"type": "image"}, {"type": "text", "text": data.QUESTION}]
        self._prompt: str = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        tokenizer = self._processor.tokenizer
        self.digit_ids = torch.tensor([tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)])

    def logits(self, rows: Tensor, answers: Tensor) -> Tensor:
        """Logits `[B, 2, V]`: of the answer's token, and of the one after `answers` (digits, int64 `[B]`)."""
        images = [Image.open(io.BytesIO(data.png(int(row)))) for row in rows]
        batch = self._processor(text=[self._prompt] * len(images), images=images, return_tensors="pt")
        answer_ids = self.digit_ids[answers][:, None]
        batch["input_ids"] = torch.cat([batch["input_ids"], answer_ids], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["mm_token_type_ids"] = functional.pad(batch["mm_token_type_ids"], (0, 1))
        logits: Tensor = self.model(**batch, logits_to_keep=2).logits
        return logits

    @torch.no_grad()
    def accuracy(self, rows: Tensor) -> float:
        """Share of the scans whose most likely answer is right."""
        labels = labels_of(rows)
        answers = self.logits(rows, labels)[:, 0].argmax(dim=-1)
        return float((answers == self.digit_ids[labels]).float().mean())


def labels_of(rows: Tensor) -> Tensor:
    """The digits written on these scans, int64 `[B]`."""
    return torch.tensor([int(data.label(int(row))) for row in rows])


def warm_start(
    model_dir: Path, seed: int, *, target_accuracy: float = 0.3, report: Callable[[str], object] = print
) -> float:
    """Train the checkpoint in `model_dir` in place; returns its accuracy on the probes, the first above the target.

    Raises:
        RuntimeError: the target was not reached within `MAX_LABEL_STEPS`.
    """
    reader = DigitReader(model_dir)
    generator = torch.Generator().manual_seed(seed)
    train_rows = torch.from_numpy(data.split()[0])
    probes = torch.from_numpy(np.random.default_rng(0).permutation(data.split()[0])[:NUM_PROBES])
    optimizer = torch.optim.AdamW(reader.model.parameters(), lr=FORM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, NUM_FORM_STEPS + 1):
        loss = _step(reader, optimizer, _draw(train_rows, generator), any_digit=True)
        if step % 4 == 0:
            report(f"warm start, form   {step:3d}: loss {loss:.2f}")
    for group in optimizer.param_groups:
        group["lr"] = LABEL_LR
    for step in range(1, MAX_LABEL_STEPS + 1):
        loss = _step(reader, optimizer, _draw(train_rows, generator), any_digit=False)
        if step % PROBE_EVERY:
            continue
        accuracy = reader.accuracy(probes)
        report(f"warm start, labels {step:3d}: loss {loss:.2f}, training accuracy {accuracy:.0%}")
        if accuracy > target_accuracy:
            reader.model.save_pretrained(model_dir)
            return accuracy
    raise RuntimeError(f"warm start: accuracy still {target_accuracy:.0%} or less after {MAX_LABEL_STEPS} steps")


def _draw(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (BATCH_SIZE,), generator=generator)]


def _step(reader: DigitReader, optimizer: torch.optim.Optimizer, rows: Tensor, *, any_digit: bool) -> float:
    """One update towards the labels (or any digit) and the end of the turn; the loss before it, in nats."""
    labels = labels_of(rows)
    logits = reader.logits(rows, labels)
    digit_logprobs = logits[:, 0].log_softmax(dim=-1)[:, reader.digit_ids]
    wanted = torch.full_like(digit_logprobs, 0.1) if any_digit else functional.one_hot(labels, 10).to(digit_logprobs)
    end = torch.full_like(labels, TOKEN_IDS["<|im_end|>"])
    loss = -(wanted * digit_logprobs).sum(dim=-1).mean() + functional.cross_entropy(logits[:, 1], end)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reader.model.parameters(), 1.0)
    optimizer.step()
    return loss.item()
