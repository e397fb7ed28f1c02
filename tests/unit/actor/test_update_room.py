"""How much of a GPU is left to vLLM beside updates, by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from actor.engine_vllm.update_room import utilization_beside_updates
from common.config import ConfigError

MIB = 2**20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """160 Mi parameters: an embedding of 96, and a layer of 64."""
    save_file({"embed": torch.zeros(96 * MIB, dtype=torch.bool).view(96, MIB)}, tmp_path / "a.safetensors")
    save_file({"layer": torch.zeros(64 * MIB, dtype=torch.bool)}, tmp_path / "b.safetensors")
    (tmp_path / "consolidated.safetensors").symlink_to("b.safetensors")  # the same once more
    return tmp_path


def _left(model: Path, total_mib: int, *, num_gpus: int = 1, has_second_set: bool = True) -> float:
    """Of 0.9, in 16 bits."""
    return utilization_beside_updates(
        model, 0.9, total_bytes=total_mib * MIB, element_bytes=2, num_gpus=num_gpus, has_second_set=has_second_set
    )


def test_an_update_is_the_model_once_more_and_two_buffers(model: Path) -> None:
    # 320 MiB of weights, and two buffers of the embedding in float32, 384 MiB each.
    assert _left(model, 8192) == pytest.approx(0.9 - (320 + 2 * 384) / 8192)


def test_the_parts_of_several_gpus_are_smaller_the_buffers_are_not(model: Path) -> None:
    assert _left(model, 8192, num_gpus=4) == pytest.approx(0.9 - (80 + 2 * 384) / 8192)


def test_what_is_kept_in_the_hosts_memory_takes_the_buffers_alone(model: Path) -> None:
    assert _left(model, 2048, has_second_set=False) == pytest.approx(0.9 - 2 * 384 / 2048)


def test_a_gpu_that_is_too_small_is_named_at_the_start(model: Path) -> None:
    problem = r"gpu_memory_utilization: 0.9 of 1 GiB has no room for the model \(0.3 GiB\) with its .* \(1.1 GiB more\)"
    with pytest.raises(ConfigError, match=problem):
        _left(model, 1024)
