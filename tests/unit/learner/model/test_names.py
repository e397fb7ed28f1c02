"""What a learner sends is what the checkpoint holds: the same names, the same values."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.model.load import load_policy
from learner.model.names import CheckpointForm
from tests.helpers.served_families import build


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "qwen3_vl_moe"])
def test_parameters_as_the_checkpoint_has_them(family: str, tmp_path: Path) -> None:
    """LLaVA: a level of names less and other prefixes. Qwen2-VL: none of it. Qwen3-VL-MoE: experts that are turned."""
    file = load_file(build(family, tmp_path) / "model.safetensors")
    model, _ = load_policy(tmp_path)
    parameters = dict(model.named_parameters())
    form = CheckpointForm(model, parameters)
    said = {name: value for own, tensor in parameters.items() for name, value in form.tensors(own, tensor.detach())}
    assert said.keys() == file.keys()
    assert [name for name in said if not torch.equal(said[name], file[name])] == []
    if family == "llava_next":
        assert not parameters.keys() & file.keys()
    if family == "qwen3_vl_moe":
        name = "model.language_model.layers.0.mlp.experts.down_proj"
        assert parameters[name].shape[1:] == file[name].shape[:0:-1] != file[name].shape[1:]
