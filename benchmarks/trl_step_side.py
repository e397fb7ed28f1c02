"""TRL's side of `step_vs_trl`: a GRPOTrainer whose batches are given, padded as it pads them: it never generates.

Runs in the peers' environment: `python -m benchmarks.trl_step_side FOLDER TORCHVISION_SHIM`. For each line
`{"steps": k}` it takes k optimizer steps, on the batches of FOLDER in turn, and answers `{"step_s": [...], "losses":
[...], "gradient_norms": {name: norm}}`; the norms are those of its very first step.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import trl_trainer


def main() -> None:
    """Build the trainer, say that it is ready, then obey."""
    folder = Path(sys.argv[1])
    rows, processor, model = trl_trainer.load(folder, sys.argv[2])

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    work = json.loads((folder / "batches.json").read_text())
    batches = [_inputs(batch, rows, processor) for batch in work["batches"]]
    losses: list[float] = []
    gradient_norms: dict[str, float] = {}

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        """Takes its batches from above."""

        def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
            batch: dict[str, Any] = batches[self._step % len(batches)]
            return batch

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    class FirstGradients(TrainerCallback):  # type: ignore[misc]
        """Notes the norms of the very first step."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not gradient_norms:
                gradient_norms.update(
                    (name, float(value.grad.norm()))
                    for name, value in model.named_parameters()
                    if value.grad is not None
                )

    num_completions = len(batches[0]["completion_ids"])
    trainer = Trainer(
        model=model,
        processing_class=processor,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl_trainer.settings(
            per_device_train_batch_size=num_completions,
            num_generations=work["group_size"],
            max_completion_length=work["max_tokens"],
            learning_rate=work["learning_rate"],
            max_grad_norm=1e9,  # the norm is computed; gradients stay as they are, to be compared
            epsilon=0.2,
        ),
        train_dataset=Dataset.from_list([{"prompt": str(index)} for index in range(num_completions)]),
        callbacks=[
            trl_trainer.gate(losses.clear, lambda: {"losses": losses, "gradient_norms": gradient_norms}),
            FirstGradients(),
        ],
    )
    facts = {
        "prompt_ids": batches[0]["prompt_ids"][0].tolist(),
        "num_tokens": [int(batch["completion_mask"].sum()) for batch in batches],
    }
    trl_trainer.tell({"ready": facts})
    trainer.train()


def _inputs(batch: dict[str, Any], rows: Any, processor: Any) -> dict[str, Any]:
    """A batch as `GRPOTrainer._generate_and_score_completions` hands it to the loss: one padded row a completion."""
    import torch
    from PIL import Image
    from torch.nn.utils.rnn import pad_sequence

    groups = [group for group in batch["groups"] for _ in group["completions"]]
    images = [Image.open(io.BytesIO(rows[group["row"]]["images"][0]["bytes"])).convert("RGB") for group in groups]
    question = rows[0]["prompt"][0]["content"].removeprefix("<image>")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    prompts = processor(text=[text] * len(images), images=images, padding=True, return_tensors="pt")

    def padded(values: list[list[Any]], value: float) -> Any:
        return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=value)

    completions = [ids for group in batch["groups"] for ids in group["completions"]]
    completion_ids = padded(completions, processor.tokenizer.pad_token_id)
    completion_mask = padded([[1] * len(ids) for ids in completions], 0)
    types = prompts["mm_token_type_ids"]
    return {
        "prompt_ids": prompts["input_ids"],
        "prompt_mask": prompts["attention_mask"],
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([value for group in batch["groups"] for value in group["advantages"]]),
        "old_per_token_logps": padded([values for group in batch["groups"] for values in group["old_logprobs"]], 0.0),
        "num_items_in_batch": completion_mask.sum(),
        "pixel_values": prompts["pixel_values"],
        "image_grid_thw": prompts["image_grid_thw"],
        "num_images": [1] * len(images),
        "mm_token_type_ids": torch.cat([types, types.new_zeros(completion_ids.shape)], dim=1),
    }


if __name__ == "__main__":
    main()
