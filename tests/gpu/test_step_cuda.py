"""The training step on a GPU is that of the CPU: in float32, packed, fused, and with parameters offloaded."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from examples.digits.model import build_model
from learner.batch.packing import pack_batch
from learner.batch.processing import PromptProcessor
from learner.config.algorithm import AlgorithmConfig
from learner.model.load import load_policy
from learner.model.logprobs import completion_logprobs
from learner.model.parallelize import parallelize
from learner.training.distributed import keep_float32
from learner.training.step import StepStats, train_step
from tests.helpers.groups import centred, mixed_groups

NUM_STEPS = 3
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    keep_float32()
    yield
    dist.destroy_process_group()


def _train(model_dir: Path, device: str, **options: Any) -> tuple[list[StepStats], dict[str, torch.Tensor], set[str]]:
    """(statistics, whole parameters after the last step, devices that hold them)."""
    model, _ = load_policy(model_dir)
    forward = partial(completion_logprobs, fused=options.pop("fused", False))
    parallelize(model, init_device_mesh(device, (1,)), **options)
    processor = PromptProcessor(model_dir)
    groups = mixed_groups(processor)
    [packs] = pack_batch(groups, centred(groups), filler=processor.filler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = AlgorithmConfig(entropy_coef=0.01)
    steps = [train_step(model, optimizer, packs, loss, policy_version=0, forward=forward) for _ in range(NUM_STEPS)]
    devices = {parameter.device.type for parameter in model.parameters()}
    return steps, {name: value.full_tensor().cpu() for name, value in model.named_parameters()}, devices


@pytest.mark.parametrize(
    ("options", "device"), [({}, "cuda"), ({"fused": True}, "cuda"), ({"cpu_offload": True}, "cpu")]
)
def test_a_gpu_takes_the_same_steps(model_dir: Path, options: dict[str, Any], device: str) -> None:
    expected, parameters, _ = _train(model_dir, "cpu")
    steps, others, devices = _train(model_dir, "cuda", **options)
    assert devices == {device}
    for step, reference in zip(steps, expected, strict=True):
        assert step.loss == pytest.approx(reference.loss, rel=TOLERANCE, abs=TOLERANCE)
        assert step.grad_norm == pytest.approx(reference.grad_norm, rel=TOLERANCE)
    for name, value in parameters.items():
        torch.testing.assert_close(
            others[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )
