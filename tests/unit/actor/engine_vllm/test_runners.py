"""What of ours depends on vLLM's model runners: on CPUs no test runs that of GPUs."""

import ast
import importlib.util
from pathlib import Path

import pytest

from actor.validation import sampling as validation_sampling
from common.types import MAX_STRINGS, MAX_TOKEN_IDS


@pytest.mark.parametrize("module", ["gpu_model_runner.py", "gpu/model_runner.py"])
def test_workers_find_the_adapters_in_either_runner(module: str) -> None:
    """`WorkerExtension.take_adapters` takes the manager that the runner has. By the source, which is long to import."""
    workers = Path(importlib.util.find_spec("vllm").origin).parent / "v1/worker"
    mixin = (workers / "lora_model_runner_mixin.py").read_text()
    assert "        self.lora_manager = LRUCacheWorkerLoRAManager(\n" in mixin
    [runner] = [
        part
        for part in ast.parse((workers / module).read_text()).body
        if isinstance(part, ast.ClassDef) and part.name == "GPUModelRunner"
    ]
    assert "LoRAModelRunnerMixin" in {base.id for base in runner.bases if isinstance(base, ast.Name)}
    methods = {part.name for part in runner.body if isinstance(part, ast.FunctionDef)}
    assert {"get_model", "reset_encoder_cache"} <= methods
    assert "load_lora_model" not in methods


def test_no_more_ids_and_words_pass_than_gpus_have_room_for() -> None:
    """One more ends the worker, and with it the engine."""
    from vllm import envs
    from vllm.v1.worker.gpu.sample import logit_bias

    assert MAX_TOKEN_IDS <= logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS
    assert MAX_TOKEN_IDS <= logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS
    assert validation_sampling._MAX_STOP_IDS <= logit_bias.MAX_NUM_STOP_TOKEN_IDS - 32
    assert 2 * MAX_STRINGS <= envs.VLLM_MAX_NUM_BAD_WORDS
    num_tokens = 2 * (validation_sampling._MAX_BAD_WORD_BYTES + MAX_STRINGS)
    assert num_tokens <= envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
