"""Real processes under FSDP2 on Gloo: any number of ranks takes the same step, and mixed modalities do not deadlock."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.digits.model import build_model
from learner.batch.pack_bytes import encode_packs
from learner.batch.packing import PackedBatch, pack_batch
from learner.batch.processing import PromptProcessor
from learner.model.load import load_policy
from learner.training.step import train_step
from learner.types import Group
from tests.helpers.enlarged import enlarge
from tests.helpers.groups import centred, group, image_bytes, mixed_groups, sample
from tests.helpers.ranks import run_ranks
from tests.integration.training_ranks import LOSS, NUM_STEPS

ROOT = Path(__file__).resolve().parents[2]

Packs = Sequence[Sequence[PackedBatch]]


@dataclass(frozen=True, slots=True)
class Result:
    """Of one case: statistics of each rank and step, packs that went in, full parameters after the last step."""

    stats: list[list[dict[str, Any]]]
    packs: Packs
    parameters: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="module")
def processor(model_dir: Path) -> PromptProcessor:
    return PromptProcessor(model_dir)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, processor: PromptProcessor) -> dict[str, Result]:
    """Every case, by one process, by two and by four: starting them is what takes the time."""
    groups = mixed_groups(processor)

    def pack(groups: list[Group], num_ranks: int, max_tokens: int = 10_000) -> Packs:
        return pack_batch(groups, centred(groups), num_ranks=num_ranks, max_tokens=max_tokens, filler=processor.filler)

    text = group(processor, sample(0, "only words"), (3, 2), seed=1)
    image = group(processor, sample(1, "see", [image_bytes(0)]), (3, 2), seed=2)
    by_modality = [*pack([text], 1), *pack([image], 1)]
    one_rank = {"sgd-1": pack(groups, 1), "sgd-1-modalities": pack([text, image], 1)}
    two_ranks = {
        "sgd-2": pack(groups, 2),
        "sgd-2-accumulated": pack(groups, 2, max_tokens=45),
        "sgd-2-accumulated-fused": pack(groups, 2, max_tokens=45),
        "sgd-2-offloaded": pack(groups, 2),
        "adamw-modalities": by_modality,
        "frozen-modalities": by_modality,
        "sgd-modalities": by_modality,
        "sgd-modalities-swapped": by_modality[::-1],
        "adamw-idle": pack([image], 2),
    }
    not_a_number = pack(groups, 2)
    not_a_number[1][0].actor_logprobs[0] = math.nan
    two_ranks["adamw-nan"] = not_a_number
    four_ranks = {"sgd-4-hybrid": pack(groups, 4)}
    directory = tmp_path_factory.mktemp("ranks")
    return {
        **_run(directory / "one", model_dir, one_rank, 1),
        **_run(directory / "two", model_dir, two_ranks, 2),
        **_run(directory / "four", model_dir, four_ranks, 4),
    }


def _run(directory: Path, model_dir: Path, cases: Mapping[str, Packs], num_ranks: int) -> dict[str, Result]:
    for name, packs in cases.items():
        (directory / name).mkdir(parents=True)
        for rank, batches in enumerate(packs):
            save_file({"packs": encode_packs(batches)}, directory / name / f"{rank}.safetensors")
    run_ranks(num_ranks, "tests.integration.training_ranks", str(model_dir), *(str(directory / name) for name in cases))
    return {
        name: Result(
            [json.loads((directory / name / f"{rank}.json").read_text()) for rank in range(num_ranks)],
            packs,
            load_file(directory / name / "parameters.safetensors"),
        )
        for name, packs in cases.items()
    }


@pytest.fixture(scope="module")
def without_fsdp(model_dir: Path, processor: PromptProcessor) -> Result:
    """The same steps in this process, on a plain model."""
    model, groups = enlarge(load_policy(model_dir)[0]), mixed_groups(processor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    packs = pack_batch(groups, centred(groups), max_tokens=10_000, filler=processor.filler)
    stats = [
        asdict(train_step(model, optimizer, packs[0], LOSS, policy_version=0, max_grad_norm=0.05))
        for _ in range(NUM_STEPS)
    ]
    return Result([stats], packs, {name: value.detach() for name, value in model.named_parameters()})


@pytest.mark.parametrize(
    ("name", "num_micro_batches"),
    [
        ("sgd-1", [1]),
        ("sgd-2", [1, 1]),
        ("sgd-2-accumulated", [3, 3]),
        ("sgd-2-accumulated-fused", [3, 3]),
        ("sgd-2-offloaded", [1, 1]),
        ("sgd-4-hybrid", [1] * 4),
    ],
)
def test_ranks_and_micro_batches_do_not_change_the_steps(
    results: dict[str, Result], without_fsdp: Result, name: str, num_micro_batches: list[int]
) -> None:
    result = results[name]
    assert [len(batches) for batches in result.packs] == num_micro_batches
    for step, expected in enumerate(without_fsdp.stats[0]):
        assert expected["grad_norm"] > 0.05  # so that clipping is part of what is compared
        for rank in result.stats:
            for key in (
                "loss",
                "grad_norm",
                "entropy",
                "mismatch_kl",
                "ratio_mean",
                "parity_max_abs_diff",
                "num_tokens",
            ):
                assert rank[step][key] == pytest.approx(expected[key], rel=2e-4, abs=1e-6), (step, key)
    assert result.parameters.keys() == without_fsdp.parameters.keys()
    for key, value in result.parameters.items():
        torch.testing.assert_close(value, without_fsdp.parameters[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw-modalities", "frozen-modalities"])
def test_a_rank_of_text_and_a_rank_of_images_do_not_wait_for_each_other(
    results: dict[str, Result], model_dir: Path, name: str
) -> None:
    result = results[name]
    text, image = result.packs[0][0], result.packs[1][0]
    assert text.media["image_grid_thw"].tolist() == image.media["image_grid_thw"].tolist() == [[1, 4, 4]]  # the filler
    assert result.stats[0] == result.stats[1]
    assert [step["num_tokens"] for step in result.stats[0]] == [10] * NUM_STEPS
    assert not any(step["skipped"] for step in result.stats[0])
    vision = "model.visual.patch_embed.proj.weight"
    before = dict(enlarge(load_policy(model_dir)[0]).named_parameters())
    assert torch.equal(result.parameters[vision], before[vision]) == name.startswith("frozen")
    assert not torch.equal(result.parameters["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.parametrize("name", ["sgd-modalities", "sgd-modalities-swapped"])
def test_text_on_one_rank_and_images_on_the_other_train_as_both_on_one(results: dict[str, Result], name: str) -> None:
    result, alone = results[name], results["sgd-1-modalities"]
    for step, expected in enumerate(alone.stats[0]):
        for rank in result.stats:
            for key in ("loss", "grad_norm", "entropy"):
                assert rank[step][key] == pytest.approx(expected[key], rel=2e-4, abs=1e-6), (step, key)
    for key, value in result.parameters.items():
        torch.testing.assert_close(value, alone.parameters[key], atol=1e-5, rtol=1e-4)


def test_a_rank_with_nothing_to_train_takes_part(results: dict[str, Result]) -> None:
    result = results["adamw-idle"]
    assert sorted(len(batches[0].targets) for batches in result.packs) == [0, 5]
    assert result.stats[0] == result.stats[1]
    assert result.stats[0][0]["num_sequences"] == 2


def test_a_difference_that_is_no_number_counts_on_any_rank(results: dict[str, Result]) -> None:
    for rank in results["adamw-nan"].stats:
        assert all(math.isnan(step["parity_max_abs_diff"]) and step["skipped"] for step in rank)


def test_all_ranks_resume_at_the_checkpoint_that_rank_0_sees(tmp_path: Path, model_dir: Path) -> None:
    run_ranks(2, "tests.integration.resume_ranks", str(tmp_path), str(model_dir))
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen == {"state": {"version": 2}, "version": 2, "values": [2.0]}


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, model_dir: Path) -> None:
    """Parameters and the optimizer's state: the next step is the one that the ranks before would have taken."""
    steps = {}
    for num_ranks in (2, 1):
        output = tmp_path / f"{num_ranks}.safetensors"
        run_ranks(num_ranks, "tests.integration.reshard_ranks", str(tmp_path / "run"), str(model_dir), str(output))
        steps[num_ranks] = load_file(output)
    assert steps[2]
    torch.testing.assert_close(steps[1], steps[2], rtol=0, atol=1e-8)


def test_ranks_of_a_node_load_one_after_the_other(tmp_path: Path, model_dir: Path) -> None:
    """Policy and reference: each rank holds them whole until they are sharded."""
    run_ranks(2, "tests.integration.loading_ranks", str(tmp_path), str(model_dir))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for rank in (first, second):
        assert [what for what, _ in rank["loads"]] == ["load", "sharded"] * 2
    assert first["loads"][-1][1] <= second["loads"][0][1]
    assert (first["outcome"], second["outcome"]) == ("no checkpoint", "went on")


@pytest.mark.parametrize("first", ["processor", "policy"])
def test_processor_and_policy_load_in_either_order_in_a_fresh_process(model_dir: Path, first: str) -> None:
    """Each repairs torchvision before importing it (common.torchvision_ops); importing them loads no model code."""
    lines = {
        "processor": "import learner.batch.processing as p; print(p.PromptProcessor(path).filler.input_ids.tolist())",
        "policy": "from learner.model.load import load_policy; print(load_policy(path)[1].num_trainable)",
    }
    second = "policy" if first == "processor" else "processor"
    code = (
        "import sys; path = sys.argv[1]\n"
        "import learner.training.step, learner.batch.packing, learner.model.parallelize\n"
        "print('transformers' in sys.modules)\n"
        f"{lines[first]}\n{lines[second]}"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(model_dir)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert output.returncode == 0, output.stderr[-3000:]
    expected = {"processor": "[262, 262, 262, 262]", "policy": "635328"}
    assert output.stdout.split("\n")[:3] == ["False", expected[first], expected[second]]
