"""A group's way to vLLM's engine process: what crosses, and what it becomes there."""

import queue
from types import SimpleNamespace
from typing import Any

import pytest


def request(n: int, seed: int | None = None) -> Any:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id="group-1",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(n=n, seed=seed, max_tokens=8),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id="group",
    )


def by_vllm(group: Any) -> list[tuple[str, int | None]]:
    """Ids and seeds of the requests of a group's samples, as vLLM's own front end makes them."""
    from vllm.v1.engine.parallel_sampling import ParentRequest

    parent = ParentRequest(group)
    children = [parent.get_child_info(index) for index in range(group.sampling_params.n)]
    return [(name, params.seed) for name, params in children]


def engine_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a group meets of the engine's process, which keeps in `failed` whose failure it told of."""
    from vllm.v1.engine.core import EngineCoreProc

    from actor.engine_vllm.groups import take_groups

    take_groups()
    core: Any = EngineCoreProc.__new__(EngineCoreProc)
    core.mm_receiver_cache = core.request_block_hasher = None
    core.engine_index, core.input_queue, core.output_queue = 0, queue.Queue(), queue.Queue()
    failed: list[str] = []
    monkeypatch.setattr(core, "_send_error_outputs_to_client", lambda names, _: failed.extend(names))
    core.failed = failed
    return core


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("n", [1, 2, 16])
async def test_a_group_crosses_once_and_becomes_the_requests_that_vllm_would_have_sent(
    n: int, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = engine_process(monkeypatch)
    sent: list[Any] = []
    front_end = front_end_of(sent, request(n, seed))
    for name in front_end.output_processor.request_states:
        child = request(1, seed)
        child.request_id = name
        await front_end.engine_core.add_request_async(child)
    [crossed] = sent
    last, _ = core.preprocess_add_request(crossed)
    put = [core.input_queue.get_nowait()[1][0] for _ in range(core.input_queue.qsize())]
    expected = [("group-1", seed)] if n == 1 else by_vllm(request(n, seed))
    assert [(each.request_id, each.sampling_params.seed) for each in [*put, last]] == expected
    assert {each.sampling_params.n for each in [*put, last]} == {1}
    assert all(each.prompt_token_ids == [1, 2, 3] for each in [*put, last])


def front_end_of(sent: list[Any], group: Any) -> Any:
    """One that knows the samples of a group, and keeps what it sends."""
    from vllm.v1.engine.parallel_sampling import ParentRequest

    from actor.engine_vllm.groups import send_groups

    async def keep(request: Any) -> None:
        sent.append(request)

    parent = ParentRequest(group) if group.sampling_params.n > 1 else None
    names = [name for name, _ in by_vllm(group)] if parent else [group.request_id]
    states = {name: SimpleNamespace(parent_req=parent, request_index=index) for index, name in enumerate(names)}
    front_end = SimpleNamespace(
        engine_core=SimpleNamespace(add_request_async=keep), output_processor=SimpleNamespace(request_states=states)
    )
    send_groups(front_end)
    return front_end


async def test_what_has_been_aborted_does_not_cross() -> None:
    sent: list[Any] = []
    front_end = front_end_of(sent, request(2))
    front_end.output_processor.request_states.clear()
    child = request(1)
    child.request_id = "0_group-1"
    await front_end.engine_core.add_request_async(child)
    assert sent == []


def test_a_failure_is_told_of_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front end waits for every one of them, and knows no request by the name of the group."""
    from vllm.multimodal.cache import MultiModalCacheMissError

    core, group = engine_process(monkeypatch), request(3)
    names = [name for name, _ in by_vllm(group)]
    core._handle_request_preproc_error(group)
    assert core.failed == names
    core._handle_mm_cache_miss(group, MultiModalCacheMissError(["hash"]))
    told = [core.output_queue.get_nowait()[1] for _ in names]
    assert [output.request_id for each in told for output in each.outputs] == names
    assert all(output.mm_cache_miss_hashes == ["hash"] for each in told for output in each.outputs)


def test_one_sample_that_cannot_be_taken_leaves_none_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core import EngineCore

    core = engine_process(monkeypatch)
    taken: list[str] = []

    def fail_at_the_third(_: Any, sample: Any) -> Any:
        taken.append(sample.request_id)
        if len(taken) == 3:
            raise ValueError("no")
        return sample, 0

    monkeypatch.setattr(EngineCore, "preprocess_add_request", fail_at_the_third)
    with pytest.raises(ValueError, match="no"):
        core.preprocess_add_request(request(4))
    assert core.input_queue.empty()
