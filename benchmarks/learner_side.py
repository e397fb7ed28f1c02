"""The learner's training step in this process, without FSDP, on groups that a benchmark makes up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from common.types import Completion, FinishReason, FloatArray, IntArray, PromptInfo, VersionSpan
from learner.batch.packing import PackedBatch
from learner.config.algorithm import AlgorithmConfig
from learner.config.optimizer import OptimizerConfig
from learner.model.load import load_policy, model_cost
from learner.model.optimizer import build_optimizer
from learner.training.step import StepStats, train_step
from learner.types import Group, ProcessedPrompt, PromptSample

# Rates stay as they are while every step does its full work.
_LEARNING_RATE = 1e-12

Gradients = dict[str, Tensor]


class LearnerSide:
    """A policy and its optimizer."""

    def __init__(self, model_dir: Path, algorithm: AlgorithmConfig) -> None:
        self.model: Any = load_policy(model_dir)[0]
        self.cost = model_cost(self.model)
        self._algorithm = algorithm
        self._optimizer = build_optimizer(self.model, OptimizerConfig(lr=_LEARNING_RATE))

    def train(self, packs: Sequence[PackedBatch]) -> StepStats:
        """One optimizer step."""
        return train_step(self.model, self._optimizer, packs, self._algorithm, policy_version=None)

    def gradients(self, packs: Sequence[PackedBatch]) -> tuple[float, Gradients]:
        """Loss of a batch, and the gradients of a step on it, which changes nothing."""
        found: Gradients = {}

        def keep(*_: Any) -> None:
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    found[name] = parameter.grad.clone()

        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(keep)
        stats = train_step(
            self.model, optimizer, packs, self._algorithm, policy_version=None, max_grad_norm=float("inf")
        )
        return stats.loss, found


def require_close_gradients(ours: Gradients, peer: Gradients, tolerance: float) -> None:
    """Raise `UnequalWorkError` unless each gradient is within the relative `tolerance` of the peer's, by its norm."""
    harness.require_equal("parameters with a gradient", sorted(ours), sorted(peer))
    for name, gradient in peer.items():
        difference = float((ours[name] - gradient).norm() / gradient.norm())
        if not difference <= tolerance:
            raise harness.UnequalWorkError(f"the gradients of {name} differ by {difference:.1e} of their norm")


def group(
    sequence: int, prompt: ProcessedPrompt, token_ids: Sequence[IntArray], logprobs: Sequence[FloatArray]
) -> Group:
    """A finished group with these completions, sampled by policy version 0."""
    completions = tuple(
        Completion(f"{sequence}/{index}", index, ids, values, FinishReason.STOP, (VersionSpan(0, 0, len(ids)),))
        for index, (ids, values) in enumerate(zip(token_ids, logprobs, strict=True))
    )
    sample = PromptSample(row=sequence, messages=(), images=(), ground_truth="")
    info = PromptInfo(str(sequence), "benchmark", prompt.input_ids, prompt.input_ids)
    rewards = np.zeros(len(completions), np.float32)
    return Group(str(sequence), sequence, sample, prompt, info, completions, rewards)
