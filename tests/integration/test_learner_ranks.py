"""Real processes under FSDP2 on Gloo: any number of ranks takes the same step, and mixed modalities do not deadlock."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.digits.model import build_model
from learner.batch.packing import PackedBatch, pack_batch
from learner.batch.processing import PromptProcessor
from learner.batch.transport import encode_packs
from learner.model.load import load_policy
from learner.step import train_step
from learner.types import Group
from tests.unit.learner_math.conftest import enlarge
from tests.unit.learner_math.groups import centred, group, image_bytes, mixed_groups, sample
from tests.unit.learner_math.ranks import LOSS, NUM_STEPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="module")
def processor(model_dir: Path) -> PromptProcessor:
    return PromptProcessor(model_dir)


def run_ranks(
    directory: Path, model_dir: Path, packs: Sequence[Sequence[PackedBatch]], name: str = "adamw"
) -> tuple[list[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """(statistics of each rank and step, full parameters after the last)."""
    out = directory / name
    out.mkdir(parents=True)
    for rank, batches in enumerate(packs):
        save_file({"packs": encode_packs(batches)}, directory / f"{rank}.safetensors")
    command = [sys.executable, "-m", "tests.unit.learner_math.ranks"]
    arguments = [str(len(packs)), str(directory / "store"), str(model_dir), str(directory), str(out)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(len(packs))
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    stats = [json.loads((out / f"{rank}.json").read_text()) for rank in range(len(packs))]
    return stats, load_file(out / "parameters.safetensors")


def test_one_rank_two_ranks_and_no_fsdp_take_the_same_steps(
    tmp_path: Path, model_dir: Path, processor: PromptProcessor
) -> None:
    groups = mixed_groups(processor)
    plain_model, plain_stats = _without_fsdp(model_dir, groups, processor)
    for num_ranks, max_tokens in ((1, 10_000), (2, 10_000), (2, 45)):
        packs = pack_batch(groups, centred(groups), num_ranks=num_ranks, max_tokens=max_tokens, filler=processor.filler)
        stats, parameters = run_ranks(tmp_path / f"{num_ranks}-{max_tokens}", model_dir, packs, "sgd")
        assert all(rank == stats[0] for rank in stats)  # every rank reports the whole batch
        for step in range(NUM_STEPS):
            for name in ("loss", "grad_norm", "entropy", "kl", "ratio_mean", "parity_max_abs_diff", "num_tokens"):
                assert stats[0][step][name] == pytest.approx(plain_stats[step][name], rel=2e-4, abs=1e-6), (step, name)
        assert parameters.keys() == plain_model.keys()
        for name, value in parameters.items():
            torch.testing.assert_close(value, plain_model[name], atol=1e-5, rtol=1e-4)


def _without_fsdp(
    model_dir: Path, groups: list[Group], processor: PromptProcessor
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    model = enlarge(load_policy(model_dir)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    [packs] = pack_batch(groups, centred(groups), max_tokens=10_000, filler=processor.filler)
    stats = []
    for _ in range(NUM_STEPS):
        result = train_step(model, optimizer, packs, LOSS, policy_version=0, max_grad_norm=0.5)
        stats.append({name: getattr(result, name) for name in result.__slots__})
    return {name: value.detach() for name, value in model.named_parameters()}, stats


@pytest.mark.parametrize("name", ["adamw", "frozen"])
def test_a_rank_of_text_and_a_rank_of_images_do_not_wait_for_each_other(
    tmp_path: Path, model_dir: Path, processor: PromptProcessor, name: str
) -> None:
    text = group(processor, sample(0, "only words"), (3, 2), seed=1)
    image = group(processor, sample(1, "see", [image_bytes(0)]), (3, 2), seed=2)
    packs = [pack_batch([g], centred([g]), filler=processor.filler)[0] for g in (text, image)]
    assert packs[0][0].media["image_grid_thw"].tolist() == [[1, 4, 4]]  # the filler
    stats, parameters = run_ranks(tmp_path, model_dir, packs, name)
    assert stats[0] == stats[1]
    assert stats[0][0]["num_tokens"] == 10
    assert not any(step["skipped"] for step in stats[0])
    vision = "model.visual.patch_embed.proj.weight"
    changed = not torch.equal(parameters[vision], dict(enlarge(load_policy(model_dir)[0]).named_parameters())[vision])
    assert changed == (name != "frozen")


def test_a_rank_with_nothing_to_train_takes_part(tmp_path: Path, model_dir: Path, processor: PromptProcessor) -> None:
    only = group(processor, sample(0, "see", [image_bytes(0)]), (3, 2))
    packs = pack_batch([only], centred([only]), num_ranks=2, filler=processor.filler)
    assert sorted(len(batches[0].targets) for batches in packs) == [0, 5]
    stats, _ = run_ranks(tmp_path, model_dir, packs)
    assert stats[0] == stats[1]
    assert stats[0][0]["num_sequences"] == 2
