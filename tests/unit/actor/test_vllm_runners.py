"""What of ours reaches into vLLM's model runners finds the same in both: on CPUs no test runs that of GPUs."""

import importlib
import inspect

import pytest


@pytest.mark.parametrize("module", ["vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"])
def test_workers_find_the_adapters_in_either_runner(module: str) -> None:
    """`WorkerExtension.take_adapters` takes the manager that the runner has."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    runner = importlib.import_module(module).GPUModelRunner
    assert runner.load_lora_model is LoRAModelRunnerMixin.load_lora_model
    assert "self.lora_manager = " in inspect.getsource(LoRAModelRunnerMixin.load_lora_model)
