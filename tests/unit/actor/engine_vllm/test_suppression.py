"""The mask over placeholder ids, as each of vLLM's model runners loads, checks and applies it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actor.engine_vllm.suppression import SUPPRESSION

CONFIG: Any = SimpleNamespace(
    model_config=SimpleNamespace(
        hf_config=SimpleNamespace(image_token_id=3, video_token_id=1),
        logits_processors=[SUPPRESSION],
        runner_type="generate",
    )
)
LOGITS = [[0.5, 9.0, -1.0, 9.0, 2.0], [0.0, -5.0, 0.0, 7.0, 0.0]]
MASKED = [[0.5, -torch.inf, -1.0, -torch.inf, 2.0], [0.0, -torch.inf, 0.0, -torch.inf, 0.0]]


def _for_first_runner() -> Any:
    from vllm.v1.sample.logits_processor import _load_custom_logitsprocs

    [loaded] = _load_custom_logitsprocs([SUPPRESSION])
    return loaded(CONFIG, torch.device("cpu"), False)


def _for_second_runner() -> Any:
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors

    requests: Any = SimpleNamespace(device=torch.device("cpu"), max_num_reqs=4, vocab_size=5)
    for name in ("all_token_ids", "prompt_len", "prefill_len", "total_len"):
        setattr(requests, name, None)
    [built] = build_custom_logits_processors(CONFIG, requests, False, [SUPPRESSION])
    return built


def test_the_runner_of_cpus_masks_every_row() -> None:
    processor = _for_first_runner()
    assert not processor.is_argmax_invariant()  # or vLLM would leave it out for greedy requests
    assert processor.apply(torch.tensor(LOGITS)).tolist() == MASKED


def test_the_runner_of_gpus_masks_every_row_of_every_request() -> None:
    from vllm import SamplingParams

    processor = _for_second_runner()
    # Else vLLM would leave out all processing for a batch of requests that ask for none.
    assert processor.add_request(2, SamplingParams()) is True
    processor.apply_staged_writes()
    assert processor.apply(torch.tensor(LOGITS), SimpleNamespace()).tolist() == MASKED


@pytest.mark.parametrize("is_second", [False, True])
def test_front_ends_of_either_runner_take_it(is_second: bool) -> None:
    """They load it before the engine is there, and show it the parameters of each request."""
    from vllm import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    front_end = InputProcessor.__new__(InputProcessor)
    front_end.model_config = CONFIG.model_config
    front_end.vllm_config = SimpleNamespace(use_v2_model_runner=is_second)
    front_end._build_logits_processors_params_validator()(SamplingParams())
