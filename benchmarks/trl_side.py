"""TRL's side of `demo_vs_trl`: a GRPOTrainer that takes as many steps as a line on its standard input says.

Runs in the peers' environment, where Outrider is not installed: `python trl_side.py WORKLOAD TORCHVISION_SHIM`. Speaks
one JSON object a line on its standard output, see `benchmarks.side`; everything else goes to standard error.
"""

import hashlib
import importlib.util
import io
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what libraries print must not mix with the answers


def load_shim(path: str) -> None:
    """Make torchvision importable, as Outrider does for itself (see the shim's own docstring)."""
    spec = importlib.util.spec_from_file_location("torchvision_ops", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the operators live as long as the module does
    spec.loader.exec_module(module)
    module.install()


def main() -> None:
    """Build the trainer, say that it is ready, then obey."""
    folder = Path(sys.argv[1])
    load_shim(sys.argv[2])
    workload = json.loads((folder / "workload.json").read_text())

    import torch  # torchvision's operators come first
    from datasets import load_dataset
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train")
    processor = AutoProcessor.from_pretrained(folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)

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

    class Gate(TrainerCallback):  # type: ignore[misc]
        """Waits for the next turn before a step, when the last turn's steps are done."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.left = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.left == 0:
                line = sys.stdin.readline()
                self.left = json.loads(line)["steps"] if line.strip() else -1
                if self.left < 0:
                    os._exit(0)
                lengths.clear()
                self.ends = [time.perf_counter()]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ends.append(time.perf_counter())
            self.left -= 1
            if self.left == 0:
                seconds = [end - start for start, end in itertools.pairwise(self.ends)]
                answer = {"step_s": seconds, "completions": len(lengths), "tokens": sum(lengths)}
                print(json.dumps(answer), file=ANSWERS)

    allowed = set(workload["allowed_token_ids"]) or set(range(workload["vocab_size"]))
    # Placeholders of media may never be sampled, as in Outrider's actor.
    allowed -= {model.config.image_token_id, model.config.video_token_id}
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=workload["num_prompts"] * workload["group_size"],
        num_generations=workload["group_size"],
        max_completion_length=workload["max_tokens"],
        generation_kwargs={"suppress_tokens": sorted(set(range(workload["vocab_size"])) - allowed)},
        learning_rate=workload["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        max_steps=1_000_000,
        logging_steps=1_000_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=reward,
        args=arguments,
        train_dataset=rows.map(to_trl, remove_columns=rows.column_names),
        callbacks=[Gate()],
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
    print(json.dumps({"ready": facts}), file=ANSWERS)
    trainer.train()


if __name__ == "__main__":
    main()
