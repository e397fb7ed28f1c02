"""Every family, every way of computing: loss and gradients are those of transformers' plain forward.

The reference is stock transformers with eager attention, one unpadded sequence at a time, the loss in a naive loop, its
gradients by autograd. Against it stand the packed step as it is, with logprobs from hidden states, with recomputed
layers, with a LoRA adapter and in bfloat16, each on one rank, on two, and with two ranks or four that share each
sequence; and transformers' own padded batch.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.media.placeholders import placeholder_ids
from common.types import Completion
from learner.batch.multimodal import extract_multi_modal_inputs
from learner.batch.pack_bytes import decode_packs, encode_packs
from learner.batch.packing import pack_batch
from learner.batch.processing import PromptProcessor
from learner.config.algorithm import AlgorithmConfig
from learner.config.model import Adapter
from learner.model.load import load_policy
from learner.model.lora import add_adapter, save_adapter
from learner.types import Group
from tests.helpers.families import FAMILIES, build
from tests.helpers.groups import centred, mixed_groups
from tests.helpers.ranks import run_ranks
from tests.integration.parity_ranks import LOSS, MODES, loss_of
from tests.integration.plain_forward import continued, distribution, plain_model, prompt_inputs

TOLERANCE = 1e-5
# In bfloat16: more than twice what rounding does to the gradients of these small models, and to one that is 0.
ROUNDED, ROUNDED_ZERO = 0.4, 1e-3
SCALING = 2.0  # of the adapter: alpha / rank
# Ranks, and how many of them share each sequence.
LAYOUTS = {"1": (1, 1), "2": (2, 1), "2-sequence-2": (2, 2), "4-sequence-2": (4, 2)}
MODES_OF = {layout: list(MODES) if num_ranks < 4 else ["packed"] for layout, (num_ranks, _) in LAYOUTS.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """What a plain model makes of the batch."""

    loss: float
    gradients: dict[str, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One family's batch."""

    directory: Path
    processor: Any
    groups: list[Group]

    @functools.cache  # noqa: B019 - lives as long as the module
    def reference(self, *, adapted: bool, loss: AlgorithmConfig = LOSS) -> Reference:
        """Plain transformers; `adapted`: with the adapter merged into its weights."""
        model = plain_model(self.directory / "model")
        if adapted:
            adapter = load_file(self.directory / "adapter" / "adapter_model.safetensors")
            with torch.no_grad():
                for name, a in adapter.items():
                    if ".lora_A." in name:
                        b = adapter[name.replace(".lora_A.", ".lora_B.")]
                        model.get_parameter(own_name(name, "A")).add_(SCALING * b @ a)
        total = 0.0
        for group, completion, advantage in self.samples():
            inputs = sequence(self.processor, group, completion.token_ids)
            share = self.share(model, model(**inputs, use_cache=False).logits[0], completion, advantage, loss)
            share.backward()
            total += share.item()
        return Reference(total, gradients_of(model))

    def padded(self) -> Reference:
        """Plain transformers on all sequences side by side, padded on the right."""
        model = plain_model(self.directory / "model")
        rows = [sequence(self.processor, group, completion.token_ids) for group, completion, _ in self.samples()]
        longest = max(row["input_ids"].shape[1] for row in rows)
        per_token = [name for name in rows[0] if rows[0][name].shape == rows[0]["input_ids"].shape]
        inputs = {
            name: torch.cat([torch.nn.functional.pad(row[name], (0, longest - row[name].shape[1])) for row in rows])
            for name in per_token
        }
        media = [{name: value for name, value in row.items() if name not in per_token} for row in rows]
        logits = model(**inputs, **extract_multi_modal_inputs(media), use_cache=False).logits
        shares = [
            self.share(model, logits[i, : row["input_ids"].shape[1]], completion, advantage, LOSS)
            for i, (row, (_, completion, advantage)) in enumerate(zip(rows, self.samples(), strict=True))
        ]
        loss = torch.stack(shares).sum()
        loss.backward()
        return Reference(loss.item(), gradients_of(model))

    def samples(self) -> Iterator[tuple[Group, Completion, float]]:
        """Group, completion and advantage of each sequence."""
        for group, advantages in zip(self.groups, centred(self.groups), strict=True):
            yield from zip(repeat(group), group.completions, advantages.tolist(), strict=False)

    def share(
        self, model: Any, logits: Tensor, completion: Completion, advantage: float, loss: AlgorithmConfig
    ) -> Tensor:
        """A sequence's share of the loss, from all its logits."""
        total = sum(len(completion.token_ids) for group in self.groups for completion in group.completions)
        predicting = logits[-len(completion.token_ids) - 1 : -1]
        logprobs, entropy = distribution(predicting, completion.token_ids, placeholder_ids(model.config))
        ratios = (logprobs - torch.from_numpy(completion.logprobs)).exp()
        objective = torch.min(ratios * advantage, ratios.clamp(1 - loss.clip_low, 1 + loss.clip_high) * advantage)
        return (-objective - loss.entropy_coef * entropy).sum() / total


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sequence(processor: Any, group: Group, completion: Any) -> dict[str, Tensor]:
    """The model's inputs for a prompt and a completion of it."""
    inputs = prompt_inputs(processor, group.sample)
    assert torch.equal(inputs["input_ids"][0], torch.from_numpy(group.processed.input_ids).long())
    return continued(inputs, completion)


def is_vision(name: str) -> bool:
    """Whether a parameter is of a vision tower."""
    return any(part in name.split(".") for part in ("visual", "vision_tower", "vision_model"))


def own_name(adapter_name: str, which: str) -> str:
    """The name in the model of the weight that an adapter's tensor belongs to."""
    return adapter_name.removeprefix("base_model.model.").replace(f".lora_{which}.", ".")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def families(directory: Path) -> Iterator[dict[str, Family]]:
    """Batches of all families."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: make_family(name, directory / name) for name in FAMILIES}
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def failure(directory: Path, families: dict[str, Family]) -> Callable[[str], str]:
    """Leaves the results of all modes in the folders of a layout of ranks, for all families: once.

    Gives what went wrong, also once: another attempt for each test would take hours.
    """

    @functools.cache
    def failure(layout: str) -> str:
        num_ranks, sequence = LAYOUTS[layout]
        folders = [str(directory / name / layout) for name in families]
        try:
            run_ranks(num_ranks, "tests.integration.parity_ranks", str(sequence), ",".join(MODES_OF[layout]), *folders)
        except AssertionError as error:
            return str(error)
        return ""

    return failure


def make_family(name: str, directory: Path) -> Family:
    build(name, directory / "model")
    processor = PromptProcessor(directory / "model")
    hf_processor = processor._processor
    groups = with_likely_logprobs(directory / "model", hf_processor, mixed_groups(processor))
    for layout, (num_ranks, sequence) in LAYOUTS.items():
        ranks = directory / layout
        ranks.mkdir()
        (ranks / "model").symlink_to(directory / "model")
        num_groups = num_ranks // sequence
        packs = pack_batch(groups, centred(groups), num_ranks=num_groups, max_tokens=400, filler=processor.filler)
        for rank in range(num_ranks):
            save_file({"packs": encode_packs(packs[rank // sequence])}, ranks / f"packs-{rank}.safetensors")
    make_adapter(directory)
    return Family(directory, hf_processor, groups)


def with_likely_logprobs(model_dir: Path, processor: Any, groups: list[Group]) -> list[Group]:
    """The groups as an actor might have sampled them: the model's own logprobs with some noise."""
    model, rng = plain_model(model_dir), np.random.default_rng(0)

    @torch.no_grad()
    def logprobs(group: Group, ids: Any) -> Any:
        logits = model(**sequence(processor, group, ids), use_cache=False).logits[0, -len(ids) - 1 : -1]
        exact = distribution(logits, ids, placeholder_ids(model.config))[0].numpy()
        return (exact + rng.normal(0, 0.1, len(ids))).astype(np.float32)

    return [
        dataclasses.replace(
            group,
            completions=tuple(
                dataclasses.replace(completion, logprobs=logprobs(group, completion.token_ids))
                for completion in group.completions
            ),
        )
        for group in groups
    ]


def make_adapter(directory: Path) -> None:
    """An adapter in every linear layer, the vision tower's too, whose B is not zero, for all layouts of ranks."""
    model, _ = load_policy(directory / "model")
    add_adapter(model, Adapter(rank=2, alpha=4))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(model, model.state_dict(), directory / "model", directory / "adapter")
    for layout in LAYOUTS:
        (directory / layout / "adapter").symlink_to(directory / "adapter")


@pytest.mark.parametrize(
    ("layout", "mode"),
    [
        pytest.param(layout, mode, marks=[pytest.mark.slow] if LAYOUTS[layout][1] > 1 else [])
        for layout, modes in MODES_OF.items()
        for mode in modes
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_forward(
    families: dict[str, Family], failure: Callable[[str], str], family: str, mode: str, layout: str
) -> None:
    assert not failure(layout)
    directory = families[family].directory
    result = json.loads((directory / layout / f"{mode}.json").read_text())
    gradients = load_file(directory / layout / f"{mode}.safetensors")
    is_adapted, is_rounded = mode.endswith("lora"), mode.startswith("bfloat16")
    expected = families[family].reference(adapted=is_adapted, loss=loss_of(mode))
    loss_bounds: dict[str, float] = {"abs": 0.01} if is_rounded else {"rel": TOLERANCE, "abs": 1e-6}
    assert result["loss"] == pytest.approx(expected.loss, **loss_bounds)
    bounds = (ROUNDED, ROUNDED_ZERO) if is_rounded else (TOLERANCE, 1e-8)
    if not is_adapted:
        assert gradients.keys() == expected.gradients.keys()
        assert any(float(gradients[name].norm()) > 1e-4 for name in gradients if is_vision(name)), "images are not seen"
        for name, gradient in gradients.items():
            assert_close(name, gradient, expected.gradients[name], bounds)
        return
    adapter = load_file(directory / "adapter" / "adapter_model.safetensors")
    # A layer that the model skips has no gradient: LLaVA takes its images from the last but one of its tower.
    used = [name for name in adapter if own_name(name, "A" if ".lora_A." in name else "B") in expected.gradients]
    assert len(gradients) == len(used) > len(adapter) / 2
    for name, gradient in gradients.items():
        file_name = "base_model.model." + name.replace(".default.", ".")
        which = "A" if ".lora_A." in name else "B"
        whole = expected.gradients[own_name(file_name, which)]
        other = adapter[file_name.replace(f".lora_{which}.", ".lora_B." if which == "A" else ".lora_A.")]
        assert_close(name, gradient, SCALING * (other.T @ whole if which == "A" else whole @ other.T), bounds)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_sequences_end_anywhere(families: dict[str, Family], family: str) -> None:
    """The packs of at least one group of ranks are no multiple of it, so the last rank has less."""
    directory = families[family].directory / "4-sequence-2"
    packs = [load_file(directory / f"packs-{rank}.safetensors")["packs"] for rank in (0, 2)]
    assert any(len(pack.input_ids) % 2 for of_group in packs for pack in decode_packs(of_group))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_of_joined_media_is_the_same(families: dict[str, Family], family: str) -> None:
    expected, padded = families[family].reference(adapted=False), families[family].padded()
    assert padded.loss == pytest.approx(expected.loss, rel=TOLERANCE, abs=1e-6)
    for name, gradient in padded.gradients.items():
        assert_close(name, gradient, expected.gradients[name])


def assert_close(name: str, actual: Tensor, expected: Tensor, bounds: tuple[float, float] = (TOLERANCE, 1e-8)) -> None:
    """Within bounds: a share of the gradient's norm, and what is added to it."""
    difference = float((actual - expected).norm())
    assert difference <= bounds[0] * float(expected.norm()) + bounds[1], (name, difference, float(expected.norm()))
