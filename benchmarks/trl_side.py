"""TRL's side of `demo_vs_trl`: a GRPOTrainer that takes as many steps as a line on its standard input says.

Runs in the peers' environment: `python -m benchmarks.trl_side WORKLOAD TORCHVISION_SHIM`, see `benchmarks.trl_trainer`.
"""

import hashlib
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
    workload = json.loads((folder / "workload.json").read_text())

    from PIL import Image
    from trl import GRPOTrainer

    def to_trl(row: dict[str, Any]) -> dict[str, Any]:
        question = row["prompt"][0]["content"].removeprefix("<image>")
        return {
            "prompt": [{"role": "user", "content": question}],
            "image": Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB"),
            "ground_truth": row["reward_model"]["ground_truth"],
        }

    lengths: list[int] = []

    def reward(completions: list[Any], ground_truth: list[str], completion_ids: list[Any], **_: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        texts = [completion[0]["content"].strip() for completion in completions]
        return [float(text == truth) for text, truth in zip(texts, ground_truth, strict=True)]

    allowed = set(workload["allowed_token_ids"]) or set(range(workload["vocab_size"]))
    # Placeholders of media may never be sampled, as in Outrider's actor.
    allowed -= {model.config.image_token_id, model.config.video_token_id}
    trainer = GRPOTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=reward,
        args=trl_trainer.settings(
            per_device_train_batch_size=workload["num_prompts"] * workload["group_size"],
            num_generations=workload["group_size"],
            max_completion_length=workload["max_tokens"],
            generation_kwargs={"suppress_tokens": sorted(set(range(workload["vocab_size"])) - allowed)},
            learning_rate=workload["learning_rate"],
            max_grad_norm=1.0,
        ),
        train_dataset=rows.map(to_trl, remove_columns=rows.column_names),
        callbacks=[trl_trainer.gate(lengths.clear, lambda: {"completions": len(lengths), "tokens": sum(lengths)})],
    )
    first = to_trl(rows[0])
    content = [{"type": "image", "image": first["image"]}, {"type": "text", "text": first["prompt"][0]["content"]}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    facts = {
        "first_prompt_ids": [int(token) for token in prompt["input_ids"][0]],
        "images_sha256": hashlib.sha256(b"".join(row["images"][0]["bytes"] for row in rows)).hexdigest(),
    }
    trl_trainer.tell({"ready": facts})
    trainer.train()


if __name__ == "__main__":
    main()
