"""One training workload on disk that both sides of a benchmark read: a checkpoint, a data set, the batch and sampling.

Layout: `model/` (Hugging Face checkpoint), `train.parquet` (verl's columns, images as PNG bytes), `workload.json`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from benchmarks.harness import say
from examples.digits import data
from examples.digits.model import TOKEN_IDS, VOCAB_SIZE, build_model
from examples.digits.prepare import prepare

# The end of a turn and 11 letters: p(end) = 1/12 under uniform logits, so lengths are geometric with mean 12.
_TAIL_TOKENS = (TOKEN_IDS["<|im_end|>"], *range(65, 76))


@dataclass(frozen=True, slots=True)
class Workload:
    """What one optimizer step is made of.

    Attributes:
        num_prompts: groups of one step.
        group_size: completions of each group.
        max_tokens: cap of a completion.
        allowed_token_ids: the only ids that may be sampled; empty for all.
        vocab_size: ids that the model knows.
        learning_rate: of AdamW, constant.
        expected_length: mean number of sampled tokens that a correct side reports, and
        length_tolerance: how far off its mean may be, relative.
    """

    num_prompts: int
    group_size: int
    max_tokens: int
    allowed_token_ids: tuple[int, ...]
    vocab_size: int
    learning_rate: float
    expected_length: float
    length_tolerance: float

    @property
    def completions_per_step(self) -> int:
        """Completions that one optimizer step trains on."""
        return self.num_prompts * self.group_size


TWO_TOKENS = Workload(64, 16, 4, (), VOCAB_SIZE, 1e-4, expected_length=2.0, length_tolerance=0.1)
# A learning rate this small leaves the logits uniform to rounding, while every step does its full work.
LONG_TAIL = Workload(32, 8, 128, _TAIL_TOKENS, VOCAB_SIZE, 1e-12, expected_length=12.0, length_tolerance=0.1)
CASES = {"two_tokens": TWO_TOKENS, "long_tail": LONG_TAIL}


def build(folder: Path, case: str) -> Workload:
    """Write the workload `case` into `folder` and return it."""
    workload = CASES[case]
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if case == "two_tokens":
        prepare(model, seed=0, report=say)
    else:
        build_model(model, seed=0)
        _make_uniform(model)
    training_rows().to_parquet(folder / "train.parquet")
    (folder / "workload.json").write_text(json.dumps(asdict(workload)))
    return workload


def _make_uniform(model: Path) -> None:
    """Zero the head of a checkpoint: every token is equally likely, whatever the prompt."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = torch.zeros_like(tensors["lm_head.weight"])
    save_file(tensors, path, metadata={"format": "pt"})


def training_rows() -> Dataset:
    """The digits' training rows in verl's convention."""
    rows, _ = data.split()
    return Dataset.from_list(
        [
            {
                "data_source": "digits",
                "prompt": [{"role": "user", "content": f"<image>{data.QUESTION}"}],
                "images": [{"bytes": data.png(int(row)), "path": None}],
                "reward_model": {"style": "rule", "ground_truth": data.label(int(row))},
            }
            for row in rows
        ]
    )
