"""LoRA adapters on the real vLLM engine: what is sampled with one is what transformers and PEFT compute."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from common.errors import InvalidRequest, WeightsPending
from learner.config.model import Adapter
from learner.model.load import load_policy
from learner.weights.epoch import EpochFailed
from learner.weights.snapshot import Snapshot, Snapshotter
from tests.helpers.fakes import until
from tests.helpers.groups import image_bytes, sample
from tests.integration.live_actor import LiveActor, Trained, WeightSource, largest_difference

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

PARITY = 1e-4
SAMPLES = [sample(0, "what is this?", [image_bytes(4, 300, 280)]), sample(1, "only words, but enough for some blocks")]


@pytest.fixture(scope="module")
def engine_settings() -> dict[str, Any]:
    return {"max_lora_rank": 4, "max_loras": 2}


def moved(taken: Snapshot, old: str, new: str) -> Snapshot:
    """The same matrices for modules of other names."""
    parameters = tuple(replace(p, name=p.name.replace(old, new)) for p in taken.trained.parameters)
    return replace(taken, trained=replace(taken.trained, parameters=parameters))


async def test_the_policy_is_the_model_with_the_adapter(
    actor: LiveActor, source: WeightSource, model_dir: Path, hf: Any
) -> None:
    first, second = Trained(model_dir, 1), Trained(model_dir, 2, ("q_proj", "v_proj", "down_proj"))
    version = await source.publish_snapshot(first.snapshot(source.version + 1))
    assert actor.engine.adapters() == ("policy",)
    for prompt in SAMPLES:
        group = await actor.group(prompt, n=4, max_tokens=12)
        assert largest_difference(first.model, hf, group) <= PARITY
        assert largest_difference(first.base, hf, group) > 100 * PARITY
        assert {span.policy_version for c in group.completions for span in c.version_spans} == {version}
    # The next version is the adapter alone. Both prompts, with the image, are in the prefix cache by now.
    taken = second.snapshot(version + 1)
    manifest = taken.update(full=False).manifest
    assert all(".lora_" in parameter.name for parameter in manifest.parameters)
    await source.publish_snapshot(taken, full=False)
    for prompt in SAMPLES:
        group = await actor.group(prompt, n=4, max_tokens=12)
        assert largest_difference(second.model, hf, group) <= PARITY
        assert largest_difference(first.model, hf, group) > 100 * PARITY
        base = await actor.group(prompt, model_dir.name, n=2, max_tokens=12)
        assert largest_difference(second.base, hf, base) <= PARITY


async def test_an_adapter_may_have_several_ranks_and_scalings(
    actor: LiveActor, source: WeightSource, model_dir: Path, hf: Any, tmp_path: Path
) -> None:
    """As PEFT writes it; vLLM packs q_proj and v_proj together."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(9)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        exclude_modules=".*visual.*",
        rank_pattern={"v_proj": 4, "down_proj": 3},
        alpha_pattern={"q_proj": 9},
        init_lora_weights=False,
    )
    by_peft = get_peft_model(AutoModelForImageTextToText.from_pretrained(model_dir), config).eval()
    by_peft.save_pretrained(str(tmp_path))
    policy, _ = load_policy(model_dir, adapter=Adapter(path=tmp_path))
    taken = Snapshotter(policy, ["model.visual"], is_sender=True, bucket_bytes=2**19).take(source.version + 1)
    assert taken is not None
    assert taken.adapter is not None
    assert (taken.adapter.rank, taken.adapter.merged_because) == (4, "")
    await source.publish_snapshot(taken)
    assert actor.engine.adapters() == ("policy",)
    base = AutoModelForImageTextToText.from_pretrained(model_dir).eval()
    for prompt in SAMPLES:
        group = await actor.group(prompt, n=2, max_tokens=12)
        assert largest_difference(by_peft.base_model.model, hf, group) <= PARITY
        assert largest_difference(base, hf, group) > 100 * PARITY


async def test_a_new_adapter_goes_under_requests_that_go_on(
    actor: LiveActor, source: WeightSource, model_dir: Path, hf: Any
) -> None:
    old, new = Trained(model_dir, 3), Trained(model_dir, 4)
    old_version = await source.publish_snapshot(old.snapshot(source.version + 1))
    long = asyncio.create_task(actor.group(SAMPLES[0], n=2, max_tokens=600, ignore_eos=True))
    of_base = asyncio.create_task(actor.group(SAMPLES[1], model_dir.name, n=1, max_tokens=600, ignore_eos=True))
    await until(lambda: actor.engine.load().num_running == 3, pause_s=0.01)
    new_version = await source.publish_snapshot(new.snapshot(old_version + 1), full=False)
    assert not long.done()
    assert not of_base.done()
    group = await long
    for completion in group.completions:
        first, second = completion.version_spans
        assert (first.policy_version, second.policy_version) == (old_version, new_version)
        alone = replace(group, completions=(completion,))
        assert largest_difference(old.model, hf, alone, slice(first.start, first.end)) <= PARITY
        assert largest_difference(new.model, hf, alone, slice(second.start, second.end)) <= PARITY
        assert largest_difference(old.model, hf, alone, slice(second.start, second.end)) > 100 * PARITY
    assert largest_difference(old.base, hf, await of_base) <= PARITY


async def test_adapters_by_name(actor: LiveActor, source: WeightSource, model_dir: Path, hf: Any) -> None:
    first, second, third = (Trained(model_dir, seed) for seed in (5, 6, 7))
    await source.publish_snapshot(first.snapshot(source.version + 1))
    await source.publish_snapshot(second.snapshot(source.version + 1, "critic"), full=False)
    assert actor.engine.adapters() == ("policy", "critic")
    await source.publish_snapshot(third.snapshot(source.version + 1), full=False)  # replaces "policy"
    # Both, and the base, in one batch; the beams and the prompt's logprobs are the adapter's too.
    groups = await asyncio.gather(
        *(actor.group(SAMPLES[0], name, n=2, max_tokens=12) for name in ("policy", "critic", model_dir.name, ""))
    )
    for trained, group in zip((third.model, second.model, first.base, third.model), groups, strict=True):
        assert largest_difference(trained, hf, group) <= PARITY
    beams = await actor.group(SAMPLES[1], "critic", n=2, num_beams=2, max_tokens=6)
    assert largest_difference(second.model, hf, beams) <= PARITY
    with pytest.raises(InvalidRequest, match=r"model: 'judge' is not here; there is .*'policy', 'critic'"):
        await actor.group(SAMPLES[1], "judge", max_tokens=1)
    version = source.version + 1
    for taken, complaint in (
        (first.snapshot(version, "judge"), "2 other adapters are here; max_loras is 2"),
        (first.snapshot(version, model_dir.name), "the name of the base model"),
        (moved(first.snapshot(version), ".self_attn.", ".no_attn."), "no_attn.*: vLLM applies no adapter there"),
    ):
        with pytest.raises(EpochFailed, match=rf"manifest\.adapter: .*{complaint}"):
            await source.publish_snapshot(taken, full=False)
        await source.abort()
    assert largest_difference(second.model, hf, await actor.group(SAMPLES[0], "critic", n=2, max_tokens=12)) <= PARITY


async def test_weights_of_the_model_void_its_adapters(
    actor: LiveActor, source: WeightSource, model_dir: Path, hf: Any
) -> None:
    """As when an actor joins that takes none: all get the adapter merged, and go on without a break."""
    # vLLM packs k_proj together with these two.
    trained = Trained(model_dir, 8, ("q_proj", "v_proj"))
    taken = trained.snapshot(source.version + 1)
    await source.publish_snapshot(taken)
    long = asyncio.create_task(actor.group(SAMPLES[0], n=2, max_tokens=600, ignore_eos=True))
    named = asyncio.create_task(actor.group(SAMPLES[1], "policy", n=1, max_tokens=600, ignore_eos=True))
    await until(lambda: actor.engine.load().num_running == 3, pause_s=0.01)
    await source.publish_snapshot(replace(taken, version=source.version + 1), full=False, merged=True)
    assert not long.done()
    assert actor.engine.adapters() == ()
    assert largest_difference(trained.model, hf, await long) <= PARITY  # the same policy in both forms
    with pytest.raises(InvalidRequest, match="'policy' is not here"):
        await named
    assert largest_difference(trained.model, hf, await actor.group(SAMPLES[1], n=2, max_tokens=12)) <= PARITY
    with pytest.raises(InvalidRequest, match="'policy' is not here"):
        await actor.group(SAMPLES[1], "policy", max_tokens=1)
    # And back: the model below the adapter again, and the adapter. What had begun without one is sampled again.
    long = asyncio.create_task(actor.group(SAMPLES[0], n=2, max_tokens=600, ignore_eos=True))
    of_base = asyncio.create_task(actor.group(SAMPLES[1], model_dir.name, n=1, max_tokens=600, ignore_eos=True))
    await until(lambda: actor.engine.load().num_running == 3, pause_s=0.01)
    await source.publish_snapshot(replace(taken, version=source.version + 1))
    with pytest.raises(WeightsPending, match="'policy' is the policy now"):
        await long
    assert len((await of_base).completions) == 1
    assert largest_difference(trained.model, hf, await actor.group(SAMPLES[1], n=2, max_tokens=12)) <= PARITY
    base = await actor.group(SAMPLES[1], model_dir.name, n=2, max_tokens=12)
    assert largest_difference(trained.base, hf, base) <= PARITY
