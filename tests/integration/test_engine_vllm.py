"""The real vLLM engine: what it samples is what transformers computes, under weights that change while it generates."""

import asyncio
import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from actor.config import ActorConfig
from actor.engine import EngineMedia
from actor.server import ActorServer
from benchmarks.counting_proxy import counting_proxy
from benchmarks.group_bytes import noise_png
from common import wire
from common.client import GrpcClient
from common.errors import NotStaged, OutriderError, StageCorrupt, StageTimeout, StaleEpoch, Unimplemented
from common.media import content_hash
from common.types import (
    ActorState,
    ChatMessage,
    ChatPrompt,
    Completion,
    FinishReason,
    MediaItem,
    MediaPart,
    Modality,
    PromptInfo,
    RolloutRequest,
    SamplingParams,
    TextPart,
    TextPrompt,
    TokenPrompt,
)
from learner.batch.packing import pack_batch
from learner.batch.processing import PromptProcessor
from learner.config.algorithm import AlgorithmConfig
from learner.model.load import load_policy
from learner.model.logprobs import completion_logprobs
from learner.training.step import train_step
from learner.types import PromptSample
from learner.weights.epoch import EpochFailed
from tests.helpers.fakes import until
from tests.helpers.groups import IMAGE_PAD, SUPPRESSED, centred, image_bytes, sample
from tests.integration.live_actor import (
    CONFIG,
    LiveActor,
    WeightSource,
    largest_difference,
    masked_logprobs,
    snapshot,
)
from tests.integration.plain_forward import continued, distribution

pytestmark = pytest.mark.asyncio(loop_scope="module")

IM_END = 258
PARITY = 1e-4

# Images of several sizes, upright, wide and too large (the processor shrinks it), two in one prompt, and none.
SAMPLES = [
    sample(0, "what is this?", [image_bytes(1)]),
    sample(1, "tall", [image_bytes(2, 56, 112)]),
    sample(2, "wide", [image_bytes(3, 150, 60)]),
    sample(3, "large", [image_bytes(4, 300, 280)]),
    sample(4, "compare", [image_bytes(5, 112, 56), image_bytes(6, 84, 84)]),
    sample(5, "no image here, only words"),
]

ONE = ChatPrompt((ChatMessage("user", (MediaPart(0), TextPart("what?"))),))

MakeModel = Callable[[], Any]


@pytest.fixture(scope="module")
def make_model(model_dir: Path) -> MakeModel:
    """The checkpoint in stock transformers, anew each time."""
    from transformers import AutoModelForImageTextToText

    return lambda: AutoModelForImageTextToText.from_pretrained(model_dir).eval()


@pytest.fixture(scope="module")
def engine_settings() -> dict[str, Any]:
    return {"max_videos": 1}


def perturbed(model: Any, seed: int) -> Any:
    """Every parameter a little off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# ---------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("prompt", SAMPLES, ids=lambda prompt: prompt.messages[0].parts[-1].text)
async def test_sampled_logprobs_are_those_of_transformers(
    actor: LiveActor, source: WeightSource, make_model: MakeModel, hf: Any, prompt: PromptSample
) -> None:
    model = make_model()
    await source.publish(model)
    group = await actor.group(prompt, n=4, max_tokens=24)
    assert np.concatenate([completion.logprobs for completion in group.completions]).std() > 0.3
    assert largest_difference(model, hf, group) <= PARITY
    # The distribution after truncation is another one: the two most likely of three allowed ids share all of it.
    allowed = (65, 66, 67)
    truncated = await actor.group(prompt, n=8, max_tokens=1, temperature=0.5, top_k=2, allowed_token_ids=allowed)
    everything = masked_logprobs(model, hf, truncated, truncated.completions[0])[0]
    ids = everything[list(allowed)].topk(2).indices + allowed[0]
    expected = dict(zip(ids.tolist(), torch.log_softmax(everything[ids] / 0.5, 0).tolist(), strict=True))
    for completion in truncated.completions:
        assert completion.logprobs[0] == pytest.approx(expected[int(completion.token_ids[0])], abs=PARITY)


async def test_greedy_tokens_are_those_of_transformers(
    actor: LiveActor, source: WeightSource, make_model: MakeModel, hf: Any
) -> None:
    model = make_model()
    await source.publish(model)
    for prompt in SAMPLES:
        [completion] = (await actor.group(prompt, temperature=0.0, max_tokens=24)).completions
        inputs = _inputs(hf, prompt)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=24, suppress_tokens=list(SUPPRESSED))
        assert completion.token_ids.tolist() == output[0, inputs["input_ids"].shape[1] :].tolist()


async def test_text_and_images_at_once(actor: LiveActor, source: WeightSource, make_model: MakeModel, hf: Any) -> None:
    """In the same steps of the engine: each group is what transformers makes of its prompt alone."""
    model = make_model()
    await source.publish(model)
    prompts = [*SAMPLES, sample(6, "words only, too"), sample(7, "more words, and none of them about an image")]
    most_running = 0

    async def watch() -> None:
        nonlocal most_running
        while True:
            most_running = max(most_running, actor.engine.load().num_running)
            await asyncio.sleep(0.001)

    watching = asyncio.create_task(watch())
    greedy, sampled = await asyncio.gather(
        asyncio.gather(*(actor.group(prompt, temperature=0.0, max_tokens=24) for prompt in prompts)),
        asyncio.gather(*(actor.group(prompt, n=3, max_tokens=24, ignore_eos=True) for prompt in prompts)),
    )
    watching.cancel()
    assert most_running >= 3 * len(prompts)
    for prompt, group, sampled_group in zip(prompts, greedy, sampled, strict=True):
        inputs = _inputs(hf, prompt)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=24, suppress_tokens=list(SUPPRESSED))
        [completion] = group.completions
        assert completion.token_ids.tolist() == output[0, inputs["input_ids"].shape[1] :].tolist()
        assert [use.sha256 for use in sampled_group.prompt.media] == [content_hash(image) for image in prompt.images]
        assert largest_difference(model, hf, sampled_group) <= PARITY


async def test_prompt_info_is_what_the_processor_yields(actor: LiveActor, hf: Any) -> None:
    for prompt in SAMPLES:
        info = (await actor.sample(prompt, max_tokens=1)).prompt
        inputs = _inputs(hf, prompt)
        assert info.expanded_ids.tolist() == inputs["input_ids"][0].tolist()
        assert info.unexpanded_ids.tolist() == hf.tokenizer(_text(hf, prompt)).input_ids
        assert info.suppressed_token_ids == actor.info.suppressed_token_ids == SUPPRESSED
        assert info.actor_id == "actor-1"
        grids = inputs["image_grid_thw"].tolist() if prompt.images else []
        assert [list(use.grid_thw) for use in info.media] == grids
        assert [use.sha256 for use in info.media] == [content_hash(image) for image in prompt.images]
        # 2 x 2 patches are one token.
        lengths = [t * h * w // 4 for t, h, w in grids]
        assert [use.placeholder.length for use in info.media] == [use.num_tokens for use in info.media] == lengths
        is_image = info.expanded_ids == IMAGE_PAD
        assert is_image.sum() == sum(lengths)
        for use in info.media:
            before, end = use.placeholder.offset - 1, use.placeholder.offset + use.placeholder.length
            assert is_image[use.placeholder.offset : end].all()
            assert not is_image[[before, end]].any()


async def test_text_and_tokens_are_the_same_prompt_as_the_chat(actor: LiveActor, hf: Any) -> None:
    for prompt in SAMPLES:
        chat = await actor.sample(prompt, temperature=0.0, max_tokens=8)
        text = await actor.sample(prompt, TextPrompt(_text(hf, prompt)), temperature=0.0, max_tokens=8)
        ids = tuple(chat.prompt.unexpanded_ids.tolist())
        tokens = await actor.sample(prompt, TokenPrompt(ids), temperature=0.0, max_tokens=8)
        for other in (text, tokens):
            assert other.prompt.unexpanded_ids.tolist() == list(ids)
            assert other.prompt.expanded_ids.tolist() == chat.prompt.expanded_ids.tolist()
            assert other.prompt.media == chat.prompt.media
            assert other.completions[0].token_ids.tolist() == chat.completions[0].token_ids.tolist()


async def test_another_image_gives_another_distribution(
    actor: LiveActor, source: WeightSource, make_model: MakeModel, hf: Any
) -> None:
    model = make_model()
    await source.publish(model)
    prompts = [sample(row, "which?", [image_bytes(100 + row)]) for row in range(2)]
    found = []
    for prompt in [*prompts, *prompts]:  # the second time with everything in the caches
        group = await actor.group(prompt, n=8, max_tokens=1, allowed_token_ids=(65, 66))
        expected = masked_logprobs(model, hf, group, group.completions[0])[0, [65, 66]].log_softmax(0)
        for completion in group.completions:
            token_id = int(completion.token_ids[0])
            assert completion.logprobs[0] == pytest.approx(float(expected[token_id - 65]), abs=PARITY)
        found.append(float(expected[0]))
    assert abs(found[0] - found[1]) > 100 * PARITY


async def test_each_sample_of_a_group_comes_once_and_whole(
    actor: LiveActor, source: WeightSource, make_model: MakeModel
) -> None:
    version = await source.publish(make_model())
    sampled = await actor.sample(SAMPLES[0], n=16, max_tokens=40, seed=7)
    assert sorted(completion.index for completion in sampled.completions) == list(range(16))
    assert len({completion.trajectory_id for completion in sampled.completions}) == 16
    assert len({completion.token_ids.tobytes() for completion in sampled.completions}) > 8
    for completion in sampled.completions:
        num_tokens = len(completion.token_ids)
        assert len(completion.logprobs) == num_tokens
        assert [(s.policy_version, s.start, s.end) for s in completion.version_spans] == [(version, 0, num_tokens)]
        if completion.finish_reason is FinishReason.STOP:
            assert completion.token_ids.tolist().index(IM_END) == num_tokens - 1
        else:
            assert num_tokens == 40
            assert IM_END not in completion.token_ids
        assert 0 < completion.first_token_s <= completion.finished_s
    again = await actor.sample(SAMPLES[0], n=16, max_tokens=40, seed=7)
    tokens = [{c.index: c.token_ids.tolist() for c in group.completions} for group in (sampled, again)]
    assert tokens[0] == tokens[1]


async def test_a_seed_gives_the_same_tokens_however_a_prompt_is_split(
    actor: LiveActor, source: WeightSource, make_model: MakeModel
) -> None:
    """The first time not all of them fit into a step; alone they do. And so when an update has them start over."""
    await source.publish(make_model())
    prompts = [TokenPrompt(tuple((7 * i + 13 * k) % 200 + 1 for i in range(1100))) for k in range(4)]

    async def completions(prompt: TokenPrompt, max_tokens: int) -> tuple[Completion, ...]:
        return (await actor.ask(prompt, n=2, max_tokens=max_tokens, seed=7, ignore_eos=True)).completions

    def tokens(groups: Iterable[tuple[Completion, ...]]) -> list[list[int]]:
        return [completion.token_ids.tolist() for group in groups for completion in group]

    together = await asyncio.gather(*(completions(prompt, 8) for prompt in prompts))
    assert tokens(together) == tokens([await completions(prompt, 8) for prompt in prompts])

    under_way = asyncio.gather(*(completions(prompt, 400) for prompt in prompts))
    await until(lambda: actor.engine.load().num_running, pause_s=0.01)
    await source.publish(make_model())  # the same weights
    over = await under_way
    assert all(len(completion.version_spans) == 2 for group in over for completion in group)
    assert tokens(over) == tokens([await completions(prompt, 400) for prompt in prompts])


async def test_closing_the_stream_frees_the_engine(actor: LiveActor) -> None:
    stream = actor.stream(SAMPLES[0], SamplingParams(n=4, max_tokens=1500, ignore_eos=True))
    assert isinstance(await anext(stream), PromptInfo)
    waiting = asyncio.ensure_future(anext(stream))
    await until(lambda: actor.engine.load().num_running, pause_s=0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await until(lambda: actor.engine.load().num_running == 0, pause_s=0.01)


async def test_placeholders_are_never_sampled(
    actor: LiveActor, source: WeightSource, make_model: MakeModel, hf: Any
) -> None:
    """One channel of every hidden state is large, and the output layer turns it into `<|image_pad|>`."""
    model = make_model()
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[:, 0] = 20.0
        model.model.language_model.norm.weight[0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[IMAGE_PAD] = 0.0
        model.lm_head.weight[IMAGE_PAD, 0] = 100.0
    await source.publish(model)
    for prompt in (SAMPLES[0], SAMPLES[5]):
        inputs = _inputs(hf, prompt)
        assert model.generate(**inputs, do_sample=False, max_new_tokens=1)[0, -1] == IMAGE_PAD
        for temperature in (0.0, 1.0):
            group = await actor.group(prompt, n=8 if temperature else 1, temperature=temperature, max_tokens=32)
            for completion in group.completions:
                assert not set(completion.token_ids.tolist()) & set(SUPPRESSED)
                ids = torch.cat([inputs["input_ids"][0], torch.from_numpy(completion.token_ids).long()])
                if not prompt.images:
                    assert (
                        model(input_ids=ids[None]).logits[0, len(inputs["input_ids"][0]) - 1 :].argmax(-1) == IMAGE_PAD
                    ).all()
            assert largest_difference(model, hf, group) <= PARITY


# ------------------------------------------------------------------------------------------------- through a server


async def test_an_image_crosses_once_and_is_processed_once(actor: LiveActor, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 samples of one image of 1 MiB, and again by another name; then another image, so that the counter counts."""
    processor: Any = actor.vllm._require().renderer.get_mm_processor()
    process = processor._apply_hf_processor_main
    num_processed = [0]

    def counted(mm_items: Any, *arguments: Any, **options: Any) -> Any:
        num_processed[0] += mm_items.get_count("image", strict=False)
        return process(mm_items, *arguments, **options)

    monkeypatch.setattr(processor, "_apply_hf_processor_main", counted)
    images = [noise_png(seed) for seed in (1, 2)]
    server = ActorServer(actor.engine, actor.info, ActorConfig(standalone=True, vllm=CONFIG), "actor-1")
    port = await server.start("127.0.0.1:0")
    try:
        async with counting_proxy("127.0.0.1", port) as (address, counts):
            client = GrpcClient(address)
            await client.server_info()
            for name, image, expected_runs in (("first", images[0], 1), ("again", images[0], 1), ("new", images[1], 2)):
                counts.take()
                request = RolloutRequest(
                    name, ONE, (MediaItem(content_hash(image), image),), SamplingParams(n=16, max_tokens=32)
                )
                group = await client.generate(request, timeout_s=60)
                taken = counts.take()
                assert num_processed[0] == expected_runs
                assert len(group.completions) == 16
                results = wire.response_to_proto(group.prompt).ByteSize()
                results += wire.response_to_proto(group.completions).ByteSize()
                if name == "again":
                    assert taken.sent < len(image) / 100
                    assert taken.total < results + len(image) / 100
                else:
                    assert len(image) < 2**20 * 1.01
                    assert len(image) < taken.sent
                    assert taken.total <= 1.02 * (len(image) + results)
            await client.close()
    finally:
        await server.stop(grace_s=0)


async def test_a_video_is_that_of_transformers(
    actor: LiveActor, source: WeightSource, make_model: MakeModel, hf: Any
) -> None:
    """`test_vllm_videos.py` has all of it; this is what every run sees."""
    model = make_model()
    await source.publish(model)
    array = np.random.default_rng(3).integers(0, 256, (4, 84, 56, 3), dtype=np.uint8)
    video = EngineMedia(bytes(32), array, modality=Modality.VIDEO, frames_per_second=12.0)
    group = await actor.ask(ONE, (video,), n=4, max_tokens=12)
    content = [{"type": "video"}, {"type": "text", "text": "what?"}]
    text = hf.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    metadata = [{"total_num_frames": 4, "fps": 12.0, "frames_indices": [0, 1, 2, 3]}]
    inputs = dict(hf(text=[text], videos=[array], video_metadata=metadata, do_sample_frames=False, return_tensors="pt"))
    assert group.prompt.expanded_ids.tolist() == inputs["input_ids"][0].tolist()
    [use] = group.prompt.media
    assert list(use.grid_thw) == inputs["video_grid_thw"][0].tolist()
    assert use.num_tokens == use.placeholder.length == (group.prompt.expanded_ids == hf.video_token_id).sum()
    for completion in group.completions:
        with torch.no_grad():
            logits = model(**continued(inputs, completion.token_ids), use_cache=False).logits[0]
        expected = distribution(logits[-len(completion.token_ids) - 1 : -1], completion.token_ids, SUPPRESSED)[0]
        np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=PARITY)


async def test_routed_experts_are_refused_by_name(actor: LiveActor) -> None:
    """By a server that was not started for them."""
    image = MediaItem(b"", image_bytes(1))
    server = ActorServer(actor.engine, actor.info, ActorConfig(standalone=True, vllm=CONFIG), "actor-1")
    client = GrpcClient(f"127.0.0.1:{await server.start('127.0.0.1:0')}")
    try:
        with pytest.raises(Unimplemented, match=r"^returns\.routed_experts: .* without vllm\.return_routed_experts"):
            await client.generate(RolloutRequest("g", ONE, (image,), return_routed_experts=True), timeout_s=30)
    finally:
        await client.close()
        await server.stop(grace_s=0)


# ----------------------------------------------------------------------------------------------------------- weights


async def test_an_update_goes_under_a_request_that_goes_on(
    actor: LiveActor, source: WeightSource, make_model: MakeModel, hf: Any
) -> None:
    old, new = make_model(), perturbed(make_model(), seed=1)
    old_version = await source.publish(old)
    epoch = await source.open()
    long = asyncio.create_task(actor.group(SAMPLES[0], n=2, max_tokens=1500, ignore_eos=True, prompt_logprobs=True))
    await until(lambda: actor.engine.load().num_running, pause_s=0.01)

    new_version = old_version + 1
    manifest, buffers, checksums = snapshot(new, new_version).update(full=True)
    spec = epoch._spec
    stage = asyncio.create_task(actor.policy.stage(spec.run_id, spec.epoch, manifest, spec.timeout_s))
    await until(lambda: actor.policy._running is not None)
    # Nothing has been sent yet. Whole groups are sampled meanwhile, by the old weights.
    for prompt in SAMPLES[:3]:
        group = await actor.group(prompt, n=2, max_tokens=8)
        assert {span.policy_version for c in group.completions for span in c.version_spans} == {old_version}
        assert largest_difference(old, hf, group) <= PARITY
    assert not stage.done()
    await epoch._sender.send(buffers, checksums)
    assert (await stage)[0] == tuple(bucket.xxh3 for bucket in manifest.buckets)
    # Staged is not live.
    group = await actor.group(SAMPLES[1], n=2, max_tokens=8)
    assert largest_difference(old, hf, group) <= PARITY
    assert not long.done()
    await actor.policy.commit(spec.run_id, spec.epoch, new_version, spec.timeout_s)
    source.version = new_version
    assert not long.done()

    group = await actor.group(SAMPLES[1], n=2, max_tokens=8)
    assert largest_difference(new, hf, group) <= PARITY
    group = await long
    assert group.prompt.prompt_logprobs_policy_version == old_version
    for completion in group.completions:
        first, second = completion.version_spans
        assert (first.policy_version, second.policy_version) == (old_version, new_version)
        assert 0 == first.start < first.end == second.start < second.end == len(completion.token_ids) == 1500
        alone = replace(group, completions=(completion,))
        assert largest_difference(old, hf, alone, slice(first.start, first.end)) <= PARITY
        assert largest_difference(new, hf, alone, slice(second.start, second.end)) <= PARITY
        assert largest_difference(old, hf, alone, slice(second.start, second.end)) > 100 * PARITY


async def test_a_pause_outlasts_updates(actor: LiveActor, source: WeightSource, make_model: MakeModel, hf: Any) -> None:
    """Two updates within it: no token is from the first of them."""
    old, new = make_model(), perturbed(make_model(), seed=4)
    old_version = await source.publish(old)
    long = asyncio.create_task(actor.group(SAMPLES[0], n=2, max_tokens=800, ignore_eos=True))
    await until(lambda: actor.engine.load().num_running, pause_s=0.01)
    await actor.policy.pause(timeout_s=600)
    await source.publish(perturbed(make_model(), seed=5))
    new_version = await source.publish(new)
    assert actor.policy.state is ActorState.PAUSED
    assert not long.done()
    await actor.policy.resume()
    group = await long
    for completion in group.completions:
        assert {span.policy_version for span in completion.version_spans} <= {old_version, new_version}
        assert completion.version_spans[-1].policy_version == new_version
        last = slice(completion.version_spans[-1].start, len(completion.token_ids))
        assert largest_difference(new, hf, replace(group, completions=(completion,)), last) <= PARITY


async def test_an_update_goes_under_requests_whose_image_came_from_the_prefix_cache(
    actor: LiveActor, source: WeightSource, make_model: MakeModel, hf: Any
) -> None:
    """Their image was never encoded for them; after the swap it must be."""
    old, new = make_model(), perturbed(make_model(), seed=3)
    await source.publish(old)
    prompt = SAMPLES[3]  # its image fills several cache blocks
    await actor.sample(prompt, n=1, max_tokens=1)
    long = asyncio.create_task(actor.group(prompt, n=4, max_tokens=600, ignore_eos=True))
    await until(lambda: actor.engine.load().num_running, pause_s=0.01)
    new_version = await source.publish(new)
    assert not long.done()
    group = await long
    for completion in group.completions:
        first, second = completion.version_spans
        assert second.policy_version == new_version
        alone = replace(group, completions=(completion,))
        assert largest_difference(old, hf, alone, slice(first.start, first.end)) <= PARITY
        assert largest_difference(new, hf, alone, slice(second.start, second.end)) <= PARITY


async def test_the_parity_meter_sees_a_stale_encoder_cache(
    actor: LiveActor, source: WeightSource, model_dir: Path
) -> None:
    """A manifest that hides that the vision tower changed leaves its old embeddings in vLLM's cache."""
    policy, _ = load_policy(model_dir)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    forward = partial(completion_logprobs, suppressed_token_ids=SUPPRESSED)
    prompts = [prompt for prompt in SAMPLES if prompt.images]
    processor = PromptProcessor(model_dir)

    async def step() -> float:
        groups = [await actor.group(prompt, n=4, max_tokens=8) for prompt in prompts]
        [packs] = pack_batch(groups, centred(groups), filler=processor.filler)
        stats = train_step(policy, optimizer, packs, AlgorithmConfig(), policy_version=source.version, forward=forward)
        assert stats.parity_tokens == stats.num_tokens == sum(len(c.token_ids) for g in groups for c in g.completions)
        return stats.parity_max_abs_diff

    tower = policy.model.visual.patch_embed.proj.weight
    await source.publish(policy)
    before = tower.detach().clone()
    assert await step() <= PARITY
    assert not torch.equal(before, tower)
    await source.publish(policy, full=False, says_vision=False)
    assert await step() > PARITY
    await source.publish(policy, full=False)
    assert await step() <= PARITY
    await source.publish(policy, full=False)
    assert await step() <= PARITY


async def _greedy(actor: LiveActor) -> tuple[list[int], list[float]]:
    [completion] = (await actor.sample(SAMPLES[0], temperature=0.0, max_tokens=16, ignore_eos=True)).completions
    return completion.token_ids.tolist(), completion.logprobs.tolist()


@pytest.fixture
def others(make_model: MakeModel) -> tuple[Any, Any]:
    """Two different models."""
    return make_model(), perturbed(make_model(), seed=2)


async def test_a_corrupt_bucket_touches_nothing(
    actor: LiveActor, source: WeightSource, others: tuple[Any, Any]
) -> None:
    version = await source.publish(others[0])
    served = await _greedy(actor)
    taken = snapshot(others[1], version + 1)
    buffers = list(taken.trained.buffers)
    buffers[1] = buffers[1].clone()
    buffers[1][12345] ^= 4
    with pytest.raises(EpochFailed, match=r"checksum of bucket\(s\) \[1\]") as failed:
        await source.publish_snapshot(replace(taken, trained=replace(taken.trained, buffers=tuple(buffers))))
    assert [type(error) for _, error in failed.value.culprits] == [StageCorrupt]
    await _still_serves(actor, source, version, served)
    await source.abort()
    await source.publish_snapshot(taken)
    assert (await _greedy(actor))[1] != served[1]


async def test_a_stage_that_does_not_end_touches_nothing(
    actor: LiveActor, source: WeightSource, others: tuple[Any, Any]
) -> None:
    version = await source.publish(others[0])
    served = await _greedy(actor)
    taken = snapshot(others[1], version + 1)
    manifest, buffers, checksums = taken.update(full=True)

    async def stage(timeout_s: float) -> "asyncio.Task[Any]":
        spec = (await source.open())._spec
        task = asyncio.create_task(actor.policy.stage(spec.run_id, spec.epoch, manifest, timeout_s))
        await until(lambda: actor.policy._running is not None)
        return task

    # The learner gives up before it has sent anything.
    task = await stage(60)
    await source.abort()
    await _fails(task, StaleEpoch)
    await _still_serves(actor, source, version, served)
    # It gives up after the first bucket.
    task = await stage(60)
    await (await source.open())._sender.send(buffers[:1], checksums[:1])
    await source.abort()
    await _fails(task, StaleEpoch)
    await _still_serves(actor, source, version, served)
    # It is silent for too long.
    await _fails(await stage(0.5), StageTimeout)
    await _still_serves(actor, source, version, served)
    await source.abort()

    await source.publish_snapshot(taken)
    assert (await _greedy(actor))[1] != served[1]


async def _fails(task: "asyncio.Task[Any]", kind: type[OutriderError]) -> None:
    async with asyncio.timeout(20):
        with pytest.raises(kind):
            await task


async def _still_serves(
    actor: LiveActor, source: WeightSource, version: int, served: tuple[list[int], list[float]]
) -> None:
    assert actor.policy.policy_version == source.version == version
    tokens, logprobs = await _greedy(actor)
    assert tokens == served[0]
    assert logprobs == pytest.approx(served[1], abs=1e-5)
    with pytest.raises(NotStaged):
        await actor.policy.commit(actor.policy.run_id, actor.policy.epoch, version + 1, 5)


# ------------------------------------------------------------------------------------------------------------- parts


def _text(hf: Any, prompt: PromptSample) -> str:
    [message] = prompt.messages
    content = [{"type": "image"} for _ in prompt.images] + [{"type": "text", "text": message.parts[-1].text}]
    text: str = hf.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return text


def _inputs(hf: Any, prompt: PromptSample) -> Any:
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in prompt.images]
    return hf(text=[_text(hf, prompt)], images=images or None, return_tensors="pt")
