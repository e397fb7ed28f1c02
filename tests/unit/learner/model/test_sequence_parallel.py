"""Who has which tokens, and who is refused; what the ranks make of it is in tests/integration."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from common.config import ConfigError
from learner.model.load import load_policy
from learner.model.parts import text_model
from learner.model.sequence_parallel import SequenceGroup, make_sequence_group, split_sequences

NO_PROCESSES: Any = None


@pytest.mark.parametrize(
    ("length", "parts"),
    [
        (8, [[1, 2], [3, 4], [5, 6], [7, 8]]),
        (6, [[1, 2], [3, 4], [5, 6], [0, 0]]),
        (5, [[1, 2], [3, 4], [5, 0], [0, 0]]),  # the last rank has nothing
        (1, [[1], [0], [0], [0]]),
        (0, [[], [], [], []]),
    ],
)
def test_each_rank_has_an_equal_share_with_zeros_at_the_end(length: int, parts: list[list[int]]) -> None:
    sequence = torch.arange(1, length + 1)
    for rank, expected in enumerate(parts):
        group = SequenceGroup(4, rank, NO_PROCESSES)
        assert group.share(sequence, 0).tolist() == expected
        assert group.share(sequence.expand(3, 1, length), -1).tolist() == [[expected]] * 3


class TextModel(nn.Module):
    def forward(self, inputs_embeds: Any, position_ids: Any) -> None: ...


class WithPerLayerInputs(nn.Module):
    def forward(self, inputs_embeds: Any, per_layer_inputs: Any) -> None: ...


class SomeModel(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        text = SimpleNamespace(**{"num_attention_heads": 4, **settings})
        self.config: Any = SimpleNamespace(get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("settings", "text", "said"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, TextModel(), "linear_attention"),
        ({"rope_parameters": {"rope_type": "longrope"}}, TextModel(), "longrope rotary embeddings"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, TextModel(), "dynamic rotary embeddings"),
        ({}, WithPerLayerInputs(), "per_layer_inputs"),
    ],
)
def test_models_that_mix_tokens_elsewhere_are_refused(settings: dict[str, Any], text: nn.Module, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_sequences(SomeModel(**settings), text, SequenceGroup(4, 0, NO_PROCESSES))
    line = f"trainer.sequence_parallel_size does not fit SomeModel: its text model has {said}; set it to 1"
    assert str(caught.value) == line


def test_heads_that_cannot_be_shared_are_refused(model_dir: Any) -> None:
    model, _ = load_policy(model_dir)
    with pytest.raises(ConfigError, match=r"size is 3, which does not divide the 4 attention heads of Qwen2_5_VL"):
        split_sequences(model, text_model(model), SequenceGroup(3, 0, NO_PROCESSES))


def test_groups_are_of_whole_ranks() -> None:
    assert make_sequence_group("cpu", 6, 1) is None
    with pytest.raises(ConfigError, match=r"trainer.sequence_parallel_size is 4, which does not divide the 6 ranks"):
        make_sequence_group("cpu", 6, 4)
