"""What a request can ask for beside tokens, over a real socket, with the fake engine."""

import math
import threading
from typing import Any

import pytest

from actor.services import rollout as service_rollout
from common.client import GrpcClient
from common.errors import TooLarge, Unimplemented
from common.types import Constraint, PromptInfo, RolloutRequest, SamplingParams, StructuredOutput, TextPrompt
from common.wire import response_to_proto
from tests.helpers.fake_actors import FakeActor, StartActor

FAST = {"token_s": 0.0}


async def _ask(actor: FakeActor, text: str = "hello", **sampling: Any) -> Any:
    client = GrpcClient(actor.address)
    try:
        params = SamplingParams(**({"max_tokens": 16, "seed": 1} | sampling))
        return await client.generate(RolloutRequest("g", TextPrompt(text), sampling=params), timeout_s=10)
    finally:
        await client.close()


async def test_top_and_prompt_logprobs(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST)
    plain = await _ask(actor, n=3)
    assert plain.prompt.prompt_logprobs == plain.prompt.prompt_top_logprobs == ()
    assert plain.prompt.prompt_logprobs_policy_version is None
    assert all(completion.top_logprobs == () and completion.beam is None for completion in plain.completions)
    asked = await _ask(actor, n=3, top_logprobs=4, prompt_logprobs=True, prompt_top_logprobs=2)
    assert asked.prompt.prompt_logprobs_policy_version == 0
    assert asked.prompt.prompt_logprobs[0] == 0
    assert asked.prompt.prompt_logprobs[1:] == pytest.approx([-math.log(320)] * 4)
    assert [len(top.token_ids) for top in asked.prompt.prompt_top_logprobs] == [0, 2, 2, 2, 2]
    for before, completion in zip(plain.completions, asked.completions, strict=True):
        assert completion.token_ids.tolist() == before.token_ids.tolist()
        assert [top.token_ids[0] for top in completion.top_logprobs] == completion.token_ids.tolist()
        assert [top.logprobs[0] for top in completion.top_logprobs] == completion.logprobs.tolist()
        assert {len(top.token_ids) for top in completion.top_logprobs} == {4}


async def test_beams(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST)
    group = await _ask(actor, n=3, num_beams=5, seed=None, length_penalty=0.5)
    scores = [completion.beam.score for completion in group.completions]
    assert scores == sorted(scores, reverse=True)
    for completion in group.completions:
        assert completion.beam.cumulative_logprob == pytest.approx(float(completion.logprobs.sum()), rel=1e-5)
    every = await _ask(actor, n=5, num_beams=5, seed=None, length_penalty=0.5)
    assert [completion.beam.score for completion in every.completions][:3] == scores


async def test_beams_count_in_the_queue(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST, limits={"max_queued_completions": 4})
    with pytest.raises(Exception, match="is 5; this actor queues 4 completions at most"):
        await _ask(actor, n=1, num_beams=5, seed=None)


async def test_what_the_fake_engine_cannot_do(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST)
    with pytest.raises(Unimplemented, match=r"sampling\.structured_output"):
        await _ask(actor, structured_output=StructuredOutput(Constraint.REGEX, "a"))


async def test_a_response_that_no_client_would_take(start_actor: StartActor) -> None:
    actor = await start_actor(fake={"token_s": 0.0, "max_context_tokens": 2**19}, limits={"max_message_bytes": 2**21})
    with pytest.raises(TooLarge, match="returns: a response of"):
        await _ask(actor, "x" * 400_000, prompt_logprobs=True)
    assert len((await _ask(actor)).completions) == 1


async def test_a_completion_that_no_message_would_hold_is_refused_before_it_is_generated(
    start_actor: StartActor,
) -> None:
    fake = {"token_s": 60.0, "max_context_tokens": 18000}
    actor = await start_actor(fake=fake, limits={"max_message_bytes": 2**21})
    with pytest.raises(TooLarge, match="can take 3840000 bytes; the limit is 2097152") as refused:
        await _ask(actor, max_tokens=8000, ignore_eos=True, top_logprobs=64)
    assert refused.value.field == "sampling.top_logprobs"


async def test_the_longest_completion_that_is_taken_fits_its_message(start_actor: StartActor) -> None:
    """The largest ids of a large vocabulary, of which each takes most bytes."""
    fake = {"token_s": 0.0, "max_context_tokens": 18000, "vocab_size": 2**21}
    actor = await start_actor(fake=fake, limits={"max_message_bytes": 2**21})
    wanted = {"ignore_eos": True, "top_logprobs": 20}
    longest = 2**21 // (32 + 7 * 20)
    with pytest.raises(TooLarge, match=r"sampling\.top_logprobs"):
        await _ask(actor, max_tokens=longest + 1, **wanted)
    group = await _ask(actor, max_tokens=longest, **wanted)
    assert len(group.completions[0].top_logprobs) == longest
    assert response_to_proto(group.completions).ByteSize() > longest * 7 * 21


async def test_the_longest_prompt_that_is_scored_fits_its_message(start_actor: StartActor) -> None:
    fake = {"token_s": 0.0, "max_context_tokens": 18000, "vocab_size": 2**21}
    actor = await start_actor(fake=fake, limits={"max_message_bytes": 2**21})
    wanted = {"prompt_logprobs": True, "prompt_top_logprobs": 20}
    longest = 2**21 // (32 + 7 * 20)
    with pytest.raises(TooLarge, match=rf"a prompt of {longest + 1} tokens can take .* limit is 2097152") as refused:
        await _ask(actor, "x" * (longest + 1), **wanted)
    assert refused.value.field == "sampling.prompt_top_logprobs"
    group = await _ask(actor, "x" * longest, **wanted)
    assert len(group.prompt.prompt_top_logprobs) == longest


async def test_logprobs_of_a_long_prompt(start_actor: StartActor) -> None:
    """Whether there are too many is known when the prompt is understood, and said before they are computed."""
    actor = await start_actor(fake={"token_s": 0.0, "max_context_tokens": 2**18})
    with pytest.raises(TooLarge, match="is 8450000; the limit is 8388608") as refused:
        await _ask(actor, "x" * 130_000, prompt_top_logprobs=64)
    assert refused.value.field == "sampling.prompt_top_logprobs"
    assert len((await _ask(actor, "x" * 130_000, prompt_logprobs=True)).prompt.prompt_logprobs) == 130_000


async def test_logprobs_do_not_hold_up_the_calls_of_others(
    start_actor: StartActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Millions of them take seconds to put into their message."""
    prompts: list[bool] = []
    completions: list[bool] = []

    def noted(event: Any) -> Any:
        on_the_loop = threading.current_thread() is threading.main_thread()
        (prompts if isinstance(event, PromptInfo) else completions).append(on_the_loop)
        return response_to_proto(event)

    monkeypatch.setattr(service_rollout, "response_to_proto", noted)
    actor = await start_actor(fake=FAST)
    for sampling in ({}, {"prompt_logprobs": True}, {"prompt_top_logprobs": 2}):
        await _ask(actor, **sampling)
    assert prompts == [True, True, False]
    completions.clear()
    for max_tokens, num_top in ((512, 0), (512, 8), (512, 9)):
        await _ask(actor, max_tokens=max_tokens, ignore_eos=True, top_logprobs=num_top)
    assert completions == [True, True, False]


async def test_a_group_that_is_asked_for_again_has_names_of_its_own(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST)
    for sampling in ({"n": 2}, {"n": 2, "num_beams": 3, "seed": None}):
        groups = [await _ask(actor, **sampling) for _ in range(2)]
        names = [completion.trajectory_id for group in groups for completion in group.completions]
        assert len(set(names)) == 4
        assert [name.split("/")[:2] for name in names] == [["g", "0"], ["g", "1"]] * 2


async def test_limits_tell_what_may_be_asked_for(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST | {"max_logprobs": 7})
    client = GrpcClient(actor.address)
    assert (await client.server_info()).limits.max_logprobs == 7
    await client.close()
    for sampling, problem in (
        ({"top_logprobs": 8}, "sampling.top_logprobs: is 8; must be 0 to 7"),
        ({"prompt_top_logprobs": 8}, "sampling.prompt_top_logprobs: is 8; must be 0 to 7"),
        ({"num_beams": 4, "seed": None}, "sampling.num_beams: is 4; must be 1 to 3"),
    ):
        with pytest.raises(Exception, match=problem):
            await _ask(actor, **sampling)
