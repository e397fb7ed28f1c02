"""How much of a GPU is left to vLLM beside updates, by hand."""

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from actor.engine_vllm.update_room import check_host_room, host_memory, utilization_beside_updates
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


def test_an_update_is_the_model_once_more_two_buffers_and_nccl(model: Path) -> None:
    # 320 MiB of weights, two buffers of the embedding in float32, 384 MiB each, and what a communicator takes.
    assert _left(model, 8192) == pytest.approx(0.9 - (320 + 2 * 384 + 1024) / 8192)


def test_the_parts_of_several_gpus_are_smaller_the_buffers_are_not(model: Path) -> None:
    assert _left(model, 8192, num_gpus=4) == pytest.approx(0.9 - (80 + 2 * 384 + 1024) / 8192)


def test_what_is_kept_in_the_hosts_memory_takes_no_second_set(model: Path) -> None:
    assert _left(model, 4096, has_second_set=False) == pytest.approx(0.9 - (2 * 384 + 1024) / 4096)


def test_a_gpu_that_is_too_small_is_named_at_the_start(model: Path) -> None:
    problem = r"gpu_memory_utilization: 0.9 of 1 GiB has no room for the model \(0.3 GiB\) with its .* \(2.1 GiB more\)"
    with pytest.raises(ConfigError, match=problem):
        _left(model, 1024)


def test_what_each_worker_keeps_has_to_fit_the_host(model: Path) -> None:
    """160 MiB of files, for a byte each: four workers keep 640."""
    check_host_room(model, num_workers=4, limit_bytes=641 * MIB)
    problem = r"each of 4 workers keeps an update of 0.2 GiB .*, 0.6 GiB in all, and there are 0.5 GiB; raise the"
    with pytest.raises(ConfigError, match=problem):
        check_host_room(model, num_workers=4, limit_bytes=512 * MIB)


@pytest.mark.parametrize(
    ("file", "says", "expected"),
    [
        ("memory.max", "268435456\n", 256 * MIB),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "268435456\n", 256 * MIB),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),  # as version 1 says that there is none
        ("another", "", None),
    ],
)
def test_the_host_is_the_container_or_the_machine(tmp_path: Path, file: str, says: str, expected: int | None) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(says)
    assert host_memory(tmp_path) == (expected or psutil.virtual_memory().total)
