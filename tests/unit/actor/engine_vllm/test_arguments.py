"""How vLLM is started: its own configuration of a tiny model, without an engine."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import Phi3Config, Qwen2Config
from vllm import platforms
from vllm.engine.arg_utils import AsyncEngineArgs

from actor.config import ActorConfig, VllmConfig
from actor.engine_vllm import arguments, plugin
from actor.engine_vllm.arguments import engine_config
from common.config import ConfigError, load_config
from examples.digits.model import build_model
from tests.helpers.served_families import qwen3_vl_moe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What starting an engine changes is put back: variables, and the parts of vLLM that the plug-in replaces."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.delitem(os.environ, "VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    monkeypatch.setattr(plugin, "register", lambda: None)


def _config(model: Path, *overrides: str) -> Any:
    return engine_config(model, load_config(ActorConfig, None, list(overrides)).vllm)


def _started(monkeypatch: pytest.MonkeyPatch, model: Path, *, is_cpu: bool) -> Any:
    """The arguments, as they are when vLLM makes its configuration of them."""
    monkeypatch.setattr(type(platforms.current_platform), "is_cpu", lambda _self: is_cpu)
    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", lambda self, _context: self)
    return engine_config(model, VllmConfig(), takes_updates=False)


@pytest.mark.parametrize("is_cpu", [True, False])
def test_processes_of_vllm_are_spawned_and_load_the_plug_in(
    monkeypatch: pytest.MonkeyPatch, model: Path, is_cpu: bool
) -> None:
    """Forked ones would outlive an actor that is killed. On CPUs vLLM spawns, but only says so later."""
    _started(monkeypatch, model, is_cpu=is_cpu)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["OUTRIDER_ACTOR_PID"] == str(os.getpid())


@pytest.mark.parametrize("is_cpu", [True, False])
def test_a_gpu_keeps_room_for_the_vision_tower(monkeypatch: pytest.MonkeyPatch, model: Path, is_cpu: bool) -> None:
    arguments = _started(monkeypatch, model, is_cpu=is_cpu)
    assert arguments.skip_mm_profiling is is_cpu


def test_samples_of_a_group_share_most_of_their_prompt_on_cpus_too(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    assert _config(model).cache_config.block_size == 32
    assert _config(model, "vllm.block_size=64").cache_config.block_size == 64
    assert _started(monkeypatch, model, is_cpu=False).block_size is None


def test_more_arguments_are_passed_on(model: Path) -> None:
    made = _config(model, "vllm.extra.mm_processor_cache_gb=0.5", "vllm.extra.hf_overrides={rope_theta: 7.0}")
    assert made.model_config.multimodal_config.mm_processor_cache_gb == 0.5
    assert made.model_config.hf_config.rope_theta == 7.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("extra.max_model_len=7", "vllm.extra.max_model_len: is a key of the configuration; set vllm.max_model_len"),
        ("extra.enable_lora=true", "vllm.extra.enable_lora: the actor sets it; leave it out"),
        ("extra.data_parallel_size=2", "vllm.extra.data_parallel_size: the actor sets it; leave it out"),
        (
            "extra.kv_cache_dtyp=fp8",
            "vllm.extra.kv_cache_dtyp: vLLM has no such argument; did you mean kv_cache_dtype?",
        ),
        ("extra.x=1", "vllm.extra.x: vLLM has no such argument; give a field of AsyncEngineArgs"),
        ("extra.kv_offloading_size=8", "vllm.extra.kv_offloading_size: what is stored there would outlive an update"),
        ("extra.kv_transfer_config={}", "vllm.extra.kv_transfer_config: what is stored there would outlive an update"),
        ("extra.ec_transfer_config={}", "vllm.extra.ec_transfer_config: what is stored there would outlive an update"),
        ("extra.speculative_config={}", "vllm.extra.speculative_config: updates do not reach the weights that draft"),
        ("extra.spec_model=x", "vllm.extra.spec_model: updates do not reach the weights that draft"),
        ("extra.quantization=foo", "vllm.extra.quantization: Unknown quantization method: foo"),
        ("extra.mm_encoder_tp_mode=foo", "vllm.extra.mm_encoder_tp_mode: Input should be 'weights'"),
        ("max_model_len=10000000", "vllm.max_model_len: User-specified max_model_len (10000000) is greater than"),
        ("tensor_parallel_size=3", "vllm.tensor_parallel_size: Total number of attention heads (4) must be divisible"),
        ("max_num_batched_tokens=16", "vllm.max_num_batched_tokens: max_num_batched_tokens (16) must be greater than"),
    ],
)
def test_what_vllm_refuses_is_one_line_with_the_key(model: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _config(model, f"vllm.{override}")
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_an_actor_without_updates_may_keep_its_cache_elsewhere(model: Path) -> None:
    made = engine_config(model, VllmConfig(extra={"kv_offloading_size": 0.5}), takes_updates=False)
    assert made.cache_config.kv_offloading_size == 0.5


def test_updates_do_not_go_into_a_quantized_checkpoint(model: Path, tmp_path: Path) -> None:
    quantized = shutil.copytree(model, tmp_path / "quantized")
    config = json.loads((model / "config.json").read_text())
    scales = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": scales}))
    with pytest.raises(ConfigError, match=r"^model: the checkpoint is quantized, .* with vllm\.extra\.quantization$"):
        _config(quantized)


def test_a_context_with_other_frequencies_than_the_learners(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With 128 in place of 64, vLLM's logprobs of 40 tokens were 1.4 from those of transformers, in the mean."""
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "original_max_position_embeddings": 64}
    Phi3Config(
        architectures=["Phi3ForCausalLM"],
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10_000.0, **factors},
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", lambda self, _context: self)
    assert engine_config(tmp_path, VllmConfig(max_model_len=65), takes_updates=False).max_model_len == 65
    assert _config(tmp_path, "vllm.max_model_len=64").max_model_len == 64
    with pytest.raises(ConfigError, match=r"^vllm\.max_model_len: is 65, .* set it to at most 64$"):
        _config(tmp_path, "vllm.max_model_len=65")


def test_a_context_beyond_the_table_of_rotary_embeddings(tmp_path: Path) -> None:
    """vLLM's default is 128 here; of a prompt of 100 tokens its logprobs were NaN, read from beyond the table."""
    Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    ).save_pretrained(tmp_path)
    assert _config(tmp_path).model_config.max_model_len == 64
    assert _config(tmp_path, "vllm.max_model_len=50").model_config.max_model_len == 50
    with pytest.raises(ConfigError, match=r"^vllm\.max_model_len: is 65, .* set it to at most 64$"):
        _config(tmp_path, "vllm.max_model_len=65")


def test_a_host_that_cannot_keep_an_update_of_experts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Said at the start, in place of being killed at the first update; an actor without updates may start."""
    qwen3_vl_moe(tmp_path)
    monkeypatch.setattr(arguments, "host_memory", lambda: 2**10)
    with pytest.raises(ConfigError, match=r"each of 2 workers keeps an update .* raise the container's memory"):
        _config(tmp_path, "vllm.tensor_parallel_size=2", "vllm.max_model_len=128")
    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", lambda self, _context: self)
    engine_config(tmp_path, VllmConfig(max_model_len=128), takes_updates=False)


def test_a_model_that_vllm_does_not_know_is_one_line(model: Path, tmp_path: Path) -> None:
    unknown = shutil.copytree(model, tmp_path / "unknown")
    config = json.loads((model / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(ConfigError) as refused:
        _config(unknown)
    assert str(refused.value).startswith("model or vllm: Model architectures ['NoSuchModel'] are not supported")
    assert len(str(refused.value)) < 400
