"""What vLLM's engine process tells of samples, and when, against all that it made."""

import queue
import random
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actor.engine_vllm.held_outputs import HELD_TOKENS, HeldOutputs, hold_outputs


def token(name: str, place: int, *, end: bool = False, rows: int = 1) -> Any:
    """Token `place` of a sample, as vLLM tells of it; its id, logprob and rank say which it is."""
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.metrics.stats import PrefillStats
    from vllm.v1.outputs import LogprobsLists

    return EngineCoreOutput(
        request_id=name,
        new_token_ids=[place],
        new_logprobs=LogprobsLists(
            np.full((1, rows), place, np.int32), np.full((1, rows), -place, np.float32), np.array([place], np.int32)
        ),
        finish_reason=FinishReason.LENGTH if end else None,
        prefill_stats=PrefillStats() if place == 0 else None,
    )


def requests(*names: str, stop: tuple[str, ...] = ()) -> dict[str, Any]:
    return {name: SimpleNamespace(sampling_params=SimpleNamespace(stop=list(stop))) for name in names}


def check_whole(outputs: list[Any], length: int) -> None:
    """Of one sample: every token once, in order, each with its own row."""
    assert [id_ for output in outputs for id_ in output.new_token_ids] == list(range(length))
    for output in outputs:
        rows = output.new_logprobs
        assert rows.logprob_token_ids[:, 0].tolist() == output.new_token_ids
        assert rows.logprobs[:, 0].tolist() == [-id_ for id_ in output.new_token_ids]
        assert rows.sampled_token_ranks.tolist() == output.new_token_ids


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_told_of_once_in_order_and_none_after_the_end(seed: int) -> None:
    rng = random.Random(seed)
    lengths = {f"sample-{index}": rng.randint(1, 3 * HELD_TOKENS) for index in range(8)}
    starts = {name: rng.randrange(HELD_TOKENS) for name in lengths}
    held, told = HeldOutputs(), defaultdict(list)
    for step in range(5 * HELD_TOKENS):
        rows = rng.choice([1, 1, 1, 4])
        places = {name: step - starts[name] for name in lengths if 0 <= step - starts[name] < lengths[name]}
        made = [token(name, place, end=place == lengths[name] - 1, rows=rows) for name, place in places.items()]
        running = [name for name, place in places.items() if place < lengths[name] - 1]
        for output in held.pass_on(made, requests(*running)):
            told[output.request_id].append(output)
        for name, place in places.items():
            if place in {0, lengths[name] - 1}:
                check_whole(told[name], place + 1)
    assert held.release() == []
    for name, length in lengths.items():
        check_whole(told[name], length)
        assert told[name][-1].finished


def test_a_long_sample_takes_few_messages() -> None:
    held = HeldOutputs()
    told = [output for place in range(161) for output in held.pass_on([token("a", place)], requests("a"))]
    assert [len(output.new_token_ids) for output in told] == [1] + [HELD_TOKENS] * (160 // HELD_TOKENS)


def test_who_looks_for_a_string_sees_every_token_at_once() -> None:
    held = HeldOutputs()
    for place in range(40):
        assert len(held.pass_on([token("a", place)], requests("a", stop=("end",)))) == 1


def test_wide_rows_are_not_kept() -> None:
    held = HeldOutputs()
    for place in range(40):
        assert len(held.pass_on([token("a", place, rows=1000)], requests("a"))) == 1


@pytest.mark.parametrize(
    "field",
    [
        "new_prompt_logprobs_tensors",
        "prompt_token_id_logprobs",
        "new_sampling_mask",
        "routed_experts",
        "kv_transfer_params",
        "ec_transfer_params",
        "events",
        "num_nans_in_logits",
    ],
)
def test_what_comes_beside_a_token_is_told_of_at_once(field: str) -> None:
    """Behind the tokens before it; joined with others it would be lost."""
    held, more = HeldOutputs(), token("a", 3)
    setattr(more, field, [object()])
    told = [output for place in range(3) for output in held.pass_on([token("a", place)], requests("a"))]
    told += held.pass_on([more], requests("a"))
    assert told[-1] is more
    check_whole(told, 4)


def test_what_is_aborted_is_forgotten() -> None:
    held = HeldOutputs()
    for place in range(3):
        held.pass_on([token("a", place), token("b", place)], requests("a", "b"))
    assert [output.request_id for output in held.pass_on([token("b", 3, end=True)], {})] == ["b", "b"]
    assert held.release() == []


def test_no_token_is_told_of_under_another_version() -> None:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import EngineCore

    hold_outputs()
    hold_outputs()  # vLLM loads plug-ins in a process that registered them itself
    core: Any = SimpleNamespace(
        _weight_version="1", scheduler=SimpleNamespace(requests=requests("a")), output_queue=queue.Queue()
    )
    told: list[Any] = []
    for place in range(6):
        if place == 4:
            EngineCore.set_weight_version(core, "2")
            client, released = core.output_queue.get_nowait()
            assert client == 0
            told.append(released)
        step = EngineCoreOutputs(outputs=[token("a", place, end=place == 5)])
        EngineCore._attach_weight_version(core, {0: step})
        told.append(step)
    of_version: dict[str, list[int]] = defaultdict(list)
    for message in told:
        of_version[message.weight_version] += [id_ for output in message.outputs for id_ in output.new_token_ids]
    assert dict(of_version) == {"1": [0, 1, 2, 3], "2": [4, 5]}
