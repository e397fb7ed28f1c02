"""One rank of a whole training run without actors: `... OUTPUT CONFIG`, among torchrun's variables.

The groups of each step come from a stand-in for the actors, the same for any number of ranks. Rank 0 writes the
statistics of each step to OUTPUT, and the tokens and bytes that one forward of a pack keeps for its backward.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from learner.batch.packing import pack_batch
from learner.batch.processing import PromptProcessor
from learner.config import LearnerConfig
from learner.data.ledger import Ledger
from learner.model.load import load_policy
from learner.model.logprobs import completion_logprobs
from learner.model.parts import text_model
from learner.model.sequence_parallel import split_sequences
from learner.training.distributed import Ranks, join_ranks
from learner.training.policy import Policy
from learner.training.trainer import RankZero, Trainer
from tests.helpers.enlarged import enlarge
from tests.helpers.groups import centred, group, image_bytes, mixed_groups, sample


def main(output: Path, config: LearnerConfig) -> None:
    torch.set_num_threads(1)
    trainer = config.trainer
    with join_ranks(trainer.device, trainer.fsdp_size, trainer.sequence_parallel_size) as ranks:
        reporter = MagicMock(**{"state.return_value": {}})
        zero = RankZero(stand_in(config), Ledger(0, 4), reporter) if ranks.is_main else None
        Trainer(config, ranks, Policy(config, ranks), output.parent / output.stem, zero).run()
        layers, kept = kept_for_backward(config, ranks)
        if ranks.is_main:
            steps = [dataclasses.asdict(call.args[2]) for call in reporter.step.call_args_list]
            output.write_text(json.dumps({"steps": steps, "tokens_of_layers": layers, "bytes_kept": kept}))


def stand_in(config: LearnerConfig) -> MagicMock:
    processor = PromptProcessor(config.model.path)
    groups = [
        dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, suppressed_token_ids=(262, 263)))
        for group in mixed_groups(processor)
    ]
    control = MagicMock(processor=processor)
    control.take_batch.return_value = groups
    control.evaluate.return_value = None
    return control


def kept_for_backward(config: LearnerConfig, ranks: Ranks) -> tuple[list[int], int]:
    """Tokens that each decoder layer sees of a long pack; bytes that autograd keeps, without parameters and masks."""
    model = enlarge(load_policy(config.model.path)[0])
    text: Any = text_model(model)
    split_sequences(model, text, ranks.sequence_group)
    processor = PromptProcessor(config.model.path)
    groups = [group(processor, sample(0, "x" * 300, [image_bytes(0)]), (400, 402), seed=1)]
    ((pack,),) = pack_batch(groups, centred(groups), filler=processor.filler)
    tokens: list[int] = []

    def count(_module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens.append(args[0].shape[1])

    for layer in text.layers:
        layer.register_forward_pre_hook(count)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_mask = tensor.ndim == 4 and tensor.shape[2] == tensor.shape[3] > 256
        if storage.data_ptr() not in known and not is_mask:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        completion_logprobs(model, pack, sequence_group=ranks.sequence_group)
    return tokens, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


if __name__ == "__main__":
    main(Path(sys.argv[1]), LearnerConfig.model_validate_json(sys.argv[2]))
