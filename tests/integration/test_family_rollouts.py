"""Every family on the real engine: prompts, placeholders, tokens and logprobs are those of transformers."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from common.config import ConfigError
from common.media import content_hash
from common.media.placeholders import image_token_id, placeholder_ids
from common.types import ChatPrompt, TokenPrompt
from learner.model.load import load_policy
from learner.types import PromptSample
from tests.helpers.groups import conversation, image_bytes, sample
from tests.helpers.served_families import SERVED_FAMILIES, build
from tests.integration.live_actor import LiveActor, WeightSource, media_of, running
from tests.integration.plain_forward import continued, distribution, plain_model, prompt_inputs

PARITY = 1e-4
NUM_TOKENS = 16
# Each family starts an engine, for most of a minute. In every run: tiles with text between them and a head that shares
# the weight of the embedding; tiles, and a tower whose parameters transformers renames.
IN_EVERY_RUN = {"idefics3"}
# vLLM's attention on CPUs is causal, also among the tokens of an image: what the actor refuses.
TEXT_ONLY = {"gemma3"}
# vLLM caches prefixes of MiniCPM-V by its layers of linear attention, which the tiny model has none of.
WITHOUT_PREFIX_CACHE = {"minicpm_v"}
# Images of several sizes, upright and wide, two in one prompt, and none.
SAMPLES = [
    sample(0, "what is this?", [image_bytes(1)]),
    sample(1, "tall", [image_bytes(2, 56, 112)]),
    sample(2, "compare", [image_bytes(3, 112, 56), image_bytes(4, 84, 84)]),
    sample(3, "no image here, only words"),
]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True, eq=False)
class Served:
    """One family's engine, and the same checkpoint in transformers."""

    directory: Path
    actor: LiveActor
    model: Any
    processor: Any
    prompts: list[PromptSample]

    def logprobs(self, prompt: PromptSample, token_ids: Any) -> Any:
        """Of sampled tokens, by the plain forward, without the ids that generation masks."""
        return plain_logprobs(self.model, self.processor, prompt, token_ids)


@torch.no_grad()
def plain_logprobs(model: Any, processor: Any, prompt: PromptSample, token_ids: Any) -> Any:
    inputs = continued(prompt_inputs(processor, prompt), token_ids)
    logits = model(**inputs, use_cache=False).logits[0, -len(token_ids) - 1 : -1]
    return distribution(logits, token_ids, placeholder_ids(model.config))[0].numpy()


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[
        pytest.param(family, marks=() if family in IN_EVERY_RUN else pytest.mark.slow)
        for family in SERVED_FAMILIES
        if family != "qwen2_5_vl"  # test_engine_vllm has it
    ],
)
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    from transformers import AutoProcessor

    directory = build(request.param, tmp_path_factory.mktemp(request.param))
    is_text_only = request.param in TEXT_ONLY
    async with running(
        directory,
        normalize_on_device=False,
        max_images=0 if is_text_only else 2,
        enable_prefix_caching=request.param not in WITHOUT_PREFIX_CACHE,
    ) as actor:
        yield Served(
            directory,
            actor,
            plain_model(directory).eval(),
            AutoProcessor.from_pretrained(directory),
            [prompt for prompt in SAMPLES if not (is_text_only and prompt.images)],
        )


async def test_prompts_are_those_of_the_processor(served: Served) -> None:
    """Expanded ids, and which of them are each image's; unexpanded, one placeholder stands for each image."""
    own_token = image_token_id(served.model.config)
    for prompt in served.prompts:
        info = (await served.actor.ask(ChatPrompt(prompt.messages), media_of(prompt.images), max_tokens=1)).prompt
        expected = prompt_inputs(served.processor, prompt)["input_ids"][0]
        assert info.expanded_ids.tolist() == expected.tolist()
        assert [use.sha256 for use in info.media] == [content_hash(image) for image in prompt.images]
        is_image = info.expanded_ids == own_token
        assert is_image.sum() == sum(use.num_tokens for use in info.media)
        end = 0
        for use in info.media:
            start, end_of_last, end = use.placeholder.offset, end, use.placeholder.offset + use.placeholder.length
            assert end_of_last <= start
            assert is_image[start:end].sum() == use.num_tokens > 0
        text = served.processor.apply_chat_template(conversation(prompt), tokenize=False, add_generation_prompt=True)
        assert info.unexpanded_ids.tolist() == served.processor.tokenizer(text).input_ids


async def test_expanded_ids_are_the_same_prompt(served: Served) -> None:
    prompt = served.prompts[-2 if len(served.prompts) > 1 else 0]
    answer: dict[str, Any] = {"temperature": 0.0, "max_tokens": NUM_TOKENS}
    first = await served.actor.ask(ChatPrompt(prompt.messages), media_of(prompt.images), **answer)
    tokens = TokenPrompt(
        tuple(first.prompt.expanded_ids.tolist()), tuple(use.placeholder for use in first.prompt.media)
    )
    second = await served.actor.ask(tokens, media_of(prompt.images), **answer)
    assert second.prompt.expanded_ids.tolist() == first.prompt.expanded_ids.tolist()
    assert second.prompt.media == first.prompt.media
    assert second.completions[0].token_ids.tolist() == first.completions[0].token_ids.tolist()


async def test_greedy_tokens_are_those_of_transformers(served: Served) -> None:
    for prompt in served.prompts:
        [completion] = (
            await served.actor.ask(
                ChatPrompt(prompt.messages), media_of(prompt.images), temperature=0.0, max_tokens=NUM_TOKENS
            )
        ).completions
        inputs = prompt_inputs(served.processor, prompt)
        output = served.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            suppress_tokens=list(placeholder_ids(served.model.config)),
        )
        assert completion.token_ids.tolist() == output[0, inputs["input_ids"].shape[1] :].tolist()


async def test_sampled_logprobs_are_those_of_transformers(served: Served) -> None:
    for prompt in served.prompts:
        group = await served.actor.ask(
            ChatPrompt(prompt.messages), media_of(prompt.images), n=4, max_tokens=NUM_TOKENS, seed=1
        )
        assert np.concatenate([completion.logprobs for completion in group.completions]).std() > 0.3
        for completion in group.completions:
            expected = served.logprobs(prompt, completion.token_ids)
            np.testing.assert_allclose(completion.logprobs, expected, atol=PARITY)


async def test_processed_tensors_are_those_of_the_processor(served: Served) -> None:
    """Of one image, on request: under the processor's own names, with its values."""
    prompt = SAMPLES[1]
    if prompt not in served.prompts:
        pytest.skip("this family takes no images on CPUs")
    expected = prompt_inputs(served.processor, prompt)
    for _ in range(2):  # also when the engine has it in its cache
        group = await served.actor.ask(
            ChatPrompt(prompt.messages), media_of(prompt.images), return_processed=True, max_tokens=1
        )
        [use] = group.prompt.media
        found = {named.name: named.tensor.array() for named in use.processed}
        assert "pixel_values" in found
        for name in found.keys() & expected.keys():
            np.testing.assert_allclose(
                found[name].reshape(-1), expected[name].numpy().astype(found[name].dtype).reshape(-1), atol=1e-5
            )


async def test_weights_of_a_learner_arrive(served: Served) -> None:
    """Under the names that the learner's model gives them; the last test of a family, for it changes the weights."""
    policy, _ = load_policy(served.directory)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    changed = plain_model(served.directory).eval()  # the policy's own attention is for packs
    changed.load_state_dict(policy.state_dict())
    source = WeightSource(served.actor)
    try:
        await source.publish(policy)
        for prompt in served.prompts:
            [completion] = (
                await served.actor.ask(ChatPrompt(prompt.messages), media_of(prompt.images), max_tokens=NUM_TOKENS)
            ).completions
            assert [span.policy_version for span in completion.version_spans] == [source.version]
            expected = plain_logprobs(changed, served.processor, prompt, completion.token_ids)
            np.testing.assert_allclose(completion.logprobs, expected, atol=PARITY)
            assert abs(served.logprobs(prompt, completion.token_ids) - expected).max() > 10 * PARITY
    finally:
        await source.abort()


@pytest.mark.parametrize("family", sorted(TEXT_ONLY))
async def test_attention_that_vllm_would_leave_out_is_refused(family: str, tmp_path: Path) -> None:
    actor = LiveActor(build(family, tmp_path))
    with pytest.raises(ConfigError, match="see each other in both directions"):
        await actor.start()
