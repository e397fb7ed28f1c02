"""`python -m learner export`: the checkpoint of a step is the model that the run would have exported there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from learner.batch.pack_bytes import encode_packs
from learner.batch.packing import pack_batch
from learner.batch.processing import PromptProcessor
from learner.config import LearnerConfig
from learner.storage.export import main
from learner.training.distributed import join_ranks
from learner.training.policy import Policy
from tests.helpers.families import build
from tests.helpers.groups import centred, group, image_bytes, sample


def trained(run_dir: Path, source: Path, **model: Any) -> tuple[Path, Path]:
    """A run of one step: its checkpoint, and what it exports."""
    settings = {
        "model": {"path": source, **model},
        "data": {"train": "unused"},
        "trainer": {"total_steps": 1, "batch_prompts": 1},
        "optimizer": {"lr": 1e-2},
    }
    config = LearnerConfig.model_validate(settings)
    processor = PromptProcessor(source)
    groups = [group(processor, sample(0, "what is this?", [image_bytes(1)]), (3, 2))]
    packs = pack_batch(groups, centred(groups), filler=processor.filler)
    with join_ranks("cpu") as ranks:
        policy = Policy(config, ranks)
        policy.step([[encode_packs(pack) for pack in packs]])
        checkpoint = policy.save(run_dir, {})
        policy.finish()
        export = policy.export(run_dir / "export")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return checkpoint, export


def files(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("qwen2_5_vl", {}),
        ("qwen2_5_vl", {"freeze_vision_tower": True}),
        ("qwen2_5_vl", {"lora_rank": 4}),
        ("gemma3", {}),  # its head is its embedding
        ("llava_next", {}),  # the names of its files are not those of its modules
    ],
)
def test_it_is_what_the_run_exports(family: str, model: dict[str, Any], tmp_path: Path) -> None:
    source = build(family, tmp_path / "source")
    checkpoint, expected = trained(tmp_path / "run", source, **model)
    assert main([str(checkpoint), str(tmp_path / "new" / "out")]) == 0
    assert files(tmp_path / "new" / "out") == files(expected)
    before = load_file(source / "model.safetensors")
    after = load_file(expected / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_dtype_is_that_of_the_source_unless_said(model_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model_dir, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    checkpoint, expected = trained(tmp_path / "run", source)
    weights = load_file(expected / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    written = json.loads((expected / "config.json").read_text())
    assert (written["dtype"], written["text_config"]["dtype"]) == ("bfloat16", "bfloat16")

    assert main([str(checkpoint), str(tmp_path / "full"), "--dtype", "float32"]) == 0
    full = load_file(tmp_path / "full" / "model.safetensors")
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    assert all(torch.equal(full[name].bfloat16(), tensor) for name, tensor in weights.items())
    assert any(not torch.equal(full[name], tensor.float()) for name, tensor in weights.items())


def test_weights_and_optimizers_of_others_are_not_copied(model_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model_dir, tmp_path / "source")
    names = ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "optimizer.pt", "rng_state_0.pth")
    for name in names:
        (source / name).write_bytes(b"old")
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"old")
    _, expected = trained(tmp_path / "run", source)
    assert set(files(expected)) == set(files(model_dir))


def test_mistakes_are_one_line(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = trained(tmp_path / "run", model_dir)
    there, out = tmp_path / "there", tmp_path / "out"
    there.mkdir()
    moved = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "checkpoints" / "step-000001")
    torn = shutil.copytree(tmp_path / "run", tmp_path / "torn") / "checkpoints" / "step-000001"
    next(torn.glob("*.distcp")).write_bytes(b"")
    capsys.readouterr()
    for arguments, code, line in (
        ([tmp_path / "run", out], 2, f"{tmp_path / 'run'} is no checkpoint of a run; give one, as "),
        ([checkpoint, there], 2, f"{there} is there already; name another directory"),
        ([moved, out], 2, f"{tmp_path / 'elsewhere'} has no config.yaml, which says what was trained"),
        ([checkpoint, out, "--model", there], 2, f"model.path: {there} holds no checkpoint"),
        ([torn, out], 1, f"{torn} cannot be read: EOFError"),
    ):
        assert main([str(argument) for argument in arguments]) == code
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.splitlines()[-1].startswith(f"export: {line}")  # behind the bars of what is loaded
    assert not out.exists()
    assert main([str(checkpoint), str(out), "--model", str(shutil.copytree(model_dir, tmp_path / "copy"))]) == 0
