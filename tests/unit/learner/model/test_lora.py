"""LoRA: what trains, what the actors get, and that PEFT and transformers read what is written."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.dtypes import tensor_in
from learner.batch.pack_bytes import encode_packs
from learner.batch.packing import PackedBatch, pack_batch
from learner.batch.processing import PromptProcessor
from learner.config import LearnerConfig
from learner.config.model import Adapter
from learner.launcher.main import _lora_rank
from learner.model.adapter_settings import _is_plain, read_settings
from learner.model.load import load_policy
from learner.model.logprobs import completion_logprobs
from learner.model.lora import adapter_parameters, add_adapter, merged_state, save_adapter, without_adapter
from learner.model.parts import vision_parts
from learner.training.distributed import Ranks, join_ranks
from learner.training.policy import Policy
from learner.weights.snapshot import Snapshot, Snapshotter
from tests.helpers.families import build
from tests.helpers.groups import SUPPRESSED, centred, mixed_groups


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with join_ranks("cpu") as ranks:
        yield ranks


@pytest.fixture
def large_model_dir(tmp_path: Path, reference_model: Any, hf_processor: Any) -> Path:
    """Weights that are large enough for mistakes to show, with the processor beside them."""
    reference_model.save_pretrained(tmp_path / "model")
    hf_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pack(processor: PromptProcessor) -> PackedBatch:
    groups = mixed_groups(processor)
    [[pack]] = pack_batch(groups, centred(groups), filler=processor.filler)
    return pack


def make_config(model_dir: Path, algorithm: dict[str, Any] | None = None, **model: Any) -> LearnerConfig:
    return LearnerConfig.model_validate(
        {
            "model": {"path": model_dir, **model},
            "data": {"train": "unused"},
            "trainer": {"total_steps": 10, "batch_prompts": 4},
            "optimizer": {"lr": 1e-2},
            "algorithm": algorithm or {},
        }
    )


@torch.no_grad()
def logprobs(model: Any, pack: PackedBatch) -> Tensor:
    return completion_logprobs(model, pack, suppressed_token_ids=SUPPRESSED)[0]


def trained(policy: Policy, pack: PackedBatch, steps: int = 3) -> Policy:
    for _ in range(steps):
        policy.step([[encode_packs([pack])]])
    return policy


def test_only_the_adapter_trains_and_everybody_else_gets_it_merged(
    large_model_dir: Path, tmp_path: Path, pack: PackedBatch, ranks: Ranks
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    policy = Policy(make_config(large_model_dir, lora_rank=4, lora_alpha=8), ranks)
    began = load_policy(large_model_dir)[0]
    torch.testing.assert_close(logprobs(policy.model, pack), logprobs(began, pack), atol=0, rtol=0)
    names = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert names
    assert all(".lora_" in name and ".visual." not in name for name in names)
    assert policy.freeze_report.num_trainable == sum(4 * sum(layer) for layer in linear_layers(began))
    assert policy.freeze_report.num_adapted == len(linear_layers(began))

    frozen = {name: full(value).clone() for name, value in policy.model.named_parameters() if name not in names}
    trained(policy, pack)
    for name, value in policy.model.named_parameters():
        if name not in names:
            assert torch.equal(full(value), frozen[name]), name
            assert value.grad is None
    now = logprobs(policy.model, pack)
    assert float((now - logprobs(began, pack)).abs().max()) > 1e-2

    snapshots: list[Snapshot] = []
    policy.snapshot(snapshots.append)
    [snapshot] = snapshots
    assert snapshot.adapter is not None
    assert snapshot.adapter.merged_because == ""
    own = load_file(large_model_dir / "model.safetensors")  # under the names of the checkpoint
    # To actors that take adapters: the adapter alone, as in PEFT's files, the scaling (8 / 4) in B.
    manifest, buffers, _ = snapshot.update(full=False)
    matrices = {parameter.name: tensor_in(buffers[parameter.bucket], parameter) for parameter in manifest.parameters}
    adapted = [name for name, module in began.named_modules() if is_adapted(name, module)]
    assert matrices.keys() == {f"base_model.model.{name}.lora_{x}.weight" for name in adapted for x in "AB"}
    assert (manifest.adapter, manifest.adapter_rank, manifest.updates_base) == ("policy", 4, False)
    assert not manifest.updates_vision
    parameters = dict(policy.model.named_parameters())
    for name, tensor in matrices.items():
        trained_name = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(tensor, full(parameters[trained_name]) * (2 if ".lora_B." in name else 1)), name
    manifest = snapshot.update(full=True).manifest
    assert {parameter.name for parameter in manifest.parameters} == own.keys() | matrices.keys()
    assert (manifest.updates_base, manifest.updates_vision) == (True, True)
    # To others: the weights that it changes, with those that engines pack together with them.
    manifest, buffers, _ = snapshot.update(full=False, merged=True)
    sent = {parameter.name for parameter in manifest.parameters}
    assert sent == {name for name in own if ".self_attn." in name or (".mlp." in name and "visual" not in name)}
    assert (manifest.adapter, manifest.updates_vision) == ("", False)
    assert {parameter.name for parameter in snapshot.update(full=True, merged=True)[0].parameters} == own.keys()

    export = policy.export(tmp_path / "export")
    merged = load_policy(export)[0]
    torch.testing.assert_close(logprobs(merged, pack), now, atol=2e-5, rtol=1e-4)
    exported = load_file(export / "model.safetensors")
    for parameter in manifest.parameters:
        assert torch.equal(tensor_in(buffers[parameter.bucket], parameter), exported[parameter.name]), parameter.name

    read = AutoModelForImageTextToText.from_pretrained(large_model_dir)
    by_peft = PeftModel.from_pretrained(read, str(export / "adapter")).merge_and_unload()
    for name, value in by_peft.named_parameters():
        torch.testing.assert_close(value, merged.get_parameter(name), atol=1e-6, rtol=1e-5)


def test_a_written_adapter_is_where_training_goes_on(
    large_model_dir: Path, tmp_path: Path, pack: PackedBatch, ranks: Ranks
) -> None:
    first = trained(Policy(make_config(large_model_dir, lora_rank=2, target_modules=["q_proj", "v_proj"]), ranks), pack)
    adapter = first.export(tmp_path / "export") / "adapter"
    second = Policy(make_config(large_model_dir, lora_adapter_path=adapter), ranks)
    assert second.freeze_report.num_adapted == first.freeze_report.num_adapted
    torch.testing.assert_close(logprobs(second.model, pack), logprobs(first.model, pack), atol=0, rtol=0)


def test_a_checkpoint_holds_the_adapter_and_resumes(
    large_model_dir: Path, tmp_path: Path, pack: PackedBatch, ranks: Ranks
) -> None:
    config = make_config(large_model_dir, lora_rank=2)
    once = trained(Policy(config, ranks), pack, steps=2)
    path = once.save(tmp_path, {})
    once.finish()
    assert sum(file.stat().st_size for file in path.rglob("*")) < 4 * 635_328 / 2  # half of the parameters alone
    again = Policy(config, ranks)
    assert again.restore(tmp_path) is not None
    assert again.version == 2
    trained(once, pack, steps=1)
    trained(again, pack, steps=1)
    for (name, a), b in zip(once.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(full(a), full(b)), name


def test_without_its_adapter_the_policy_is_the_reference_of_the_kl_term(
    large_model_dir: Path, pack: PackedBatch, ranks: Ranks
) -> None:
    policy = Policy(make_config(large_model_dir, {"kl_coef": 0.1}, lora_rank=4), ranks)
    began = logprobs(load_policy(large_model_dir)[0], pack)
    ((first,),) = policy.step([[encode_packs([pack])]])
    assert first.reference_kl == pytest.approx(0.0, abs=1e-9)
    ((second,),) = policy.step([[encode_packs([pack])]])
    assert second.reference_kl > 1e-5
    with without_adapter(policy.model):
        assert torch.equal(logprobs(policy.model, pack), began)
    assert not torch.equal(logprobs(policy.model, pack), began)


def test_gradients_are_those_of_the_product(large_model_dir: Path, pack: PackedBatch) -> None:
    """dL/dA and dL/dB against dL/dW of the merged model: scaling * B^T dW and scaling * dW A^T."""
    adapted, _ = load_policy(large_model_dir, adapter=Adapter(rank=3, alpha=6, target_modules=("o_proj",)))
    torch.manual_seed(1)
    plain = load_policy(large_model_dir)[0]
    layers = {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    with torch.no_grad():
        for name, layer in layers.items():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
            delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            plain.get_parameter(f"{name}.weight").add_(delta)
    for model in (adapted, plain):
        completion_logprobs(model, pack, suppressed_token_ids=SUPPRESSED)[0].sum().backward()
    assert len(layers) == 2
    for name, layer in layers.items():
        gradient = plain.get_parameter(f"{name}.weight").grad
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(a.grad, 2.0 * b.T @ gradient, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(b.grad, 2.0 * gradient @ a.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "idefics3"])
def test_what_an_image_passes_has_an_adapter_only_where_a_pattern_reaches_it(family: str, tmp_path: Path) -> None:
    """Else each update would be merged, although nobody asked for more than `lora_rank`."""
    build(family, tmp_path)

    def adapted(**settings: Any) -> set[bool]:
        model, _ = load_policy(tmp_path, adapter=Adapter(rank=2, **settings))
        parts = tuple(f"{part}." for part in vision_parts(model))
        return {name.startswith(parts) for name, _ in model.named_parameters() if ".lora_A." in name}

    assert adapted() == adapted(target_modules=("q_proj", "v_proj")) == {False}
    assert adapted(target_modules=r".*\.(qkv|q_proj)") == {False, True}


def test_the_launcher_asks_actors_for_adapters_that_they_can_take(model_dir: Path) -> None:
    def rank(**model: Any) -> int:
        return _lora_rank(make_config(model_dir, **model))

    assert (rank(), rank(lora_rank=4)) == (0, 4)
    pattern = {"lora_rank": 4, "target_modules": ".*attn.*"}
    assert (rank(**pattern), rank(**pattern, freeze_vision_tower=True)) == (0, 4)


def test_parts_and_modules_are_left_out(model_dir: Path) -> None:
    model = load_policy(model_dir)[0]
    adapter = Adapter(rank=2, exclude_modules=("mlp.up_proj",))
    with_vision = add_adapter(copy.deepcopy(model), adapter)
    assert add_adapter(model, adapter, left_out=["model.visual"]) < with_vision
    names = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    assert any("gate_proj" in name for name in names)
    assert not any("up_proj" in name or "visual" in name or "lm_head" in name for name in names)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_modules": ["no_such_layer"], "lora_rank": 2}, "no_such_layer"),
        ({"target_modules": ["qkv"], "lora_rank": 2}, r"no layer for .*qkv.* outside model\.visual, "),
        (
            {"freeze_language_model": True, "lora_rank": 2},
            r"outside model\.visual, .*, model\.language_model, lm_head: ",
        ),
        (
            {"target_modules": ["q_proj", "embed_tokens"], "lora_rank": 2},
            "embed_tokens is a Embedding, .*exclude_modules",
        ),
        ({"target_modules": ".*visual.*(qkv|proj)", "lora_rank": 2}, "patch_embed.proj is a Conv3d, .*exclude_modules"),
        ({"lora_alpha": 3}, "lora_alpha needs lora_rank"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules needs lora_rank"),
        ({"lora_rank": 2, "lora_adapter_path": "x"}, "set one of them"),
    ],
)
def test_mistakes_are_named(model_dir: Path, settings: dict[str, Any], match: str, ranks: Ranks) -> None:
    with pytest.raises(ValueError, match=match):
        Policy(make_config(model_dir, **settings), ranks)


def test_an_output_layer_that_is_the_embeddings_is_refused(model_dir: Path) -> None:
    """Served models tie them again, by their configuration, and would lose the adapter."""
    model = load_policy(model_dir)[0]
    model.lm_head.weight = model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="lm_head has the weight of the embeddings"):
        add_adapter(model, Adapter(rank=2, target_modules=("q_proj", "lm_head")))


def test_an_adapter_of_another_model_is_refused(model_dir: Path, tmp_path: Path, ranks: Ranks) -> None:
    Policy(make_config(model_dir, lora_rank=2), ranks).export(tmp_path / "export")
    file = tmp_path / "export" / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"r": 2', '"r": 4'))
    with pytest.raises(ValueError, match=r"has shape \[2, .*the model wants \[4, "):
        Policy(make_config(model_dir, lora_adapter_path=file.parent), ranks)


@pytest.mark.parametrize(
    "odd",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "lora_ga"},
        {"peft_type": "ADALORA"},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"alora_invocation_tokens": [1, 2]},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"velora_config": {"scale": 1.0}},
        {"kasa_config": {"beta": 0.1}},
        {"arrow_config": {"top_k": 2}},
        {"monteclora_config": {"buffer_size": 8}},
        {"loftq_config": {"loftq_bits": 4}},
        {"ensure_weight_tying": True},
        {"fan_in_fan_out": True},
        {"use_something_of_next_year": True},
    ],
)
def test_what_is_more_than_lora_is_refused(tmp_path: Path, model_dir: Path, odd: dict[str, Any]) -> None:
    model = load_policy(model_dir, adapter=Adapter(rank=2))[0]
    save_adapter(model, model.state_dict(), model_dir, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    assert read_settings(file.parent)["r"] == 2
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    with pytest.raises(ValueError, match=f"is not a plain LoRA adapter: it has {next(iter(odd))}: ") as refusal:
        load_policy(model_dir, adapter=Adapter(path=file.parent))
    assert "\n" not in str(refusal.value)


def test_each_setting_of_peft_is_off_or_known() -> None:
    """A new one of PEFT's, with a default that is neither, is to be looked at."""
    from peft import LoraConfig

    settings = dataclasses.asdict(LoraConfig())
    assert [name for name, value in settings.items() if not _is_plain(name, value)] == []


def test_a_directory_without_adapter_is_named(tmp_path: Path, model_dir: Path) -> None:
    for content in (None, "{", "[]"):
        if content is not None:
            (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(ValueError, match=f"{tmp_path} holds no adapter: adapter_config.json"):
            load_policy(model_dir, adapter=Adapter(path=tmp_path))


def test_an_adapter_of_several_ranks_and_scalings_is_what_peft_makes_of_it(
    large_model_dir: Path, tmp_path: Path, pack: PackedBatch
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForImageTextToText

    def base() -> Any:
        return AutoModelForImageTextToText.from_pretrained(large_model_dir)

    torch.manual_seed(0)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        exclude_modules=r".*visual.*",
        rank_pattern={"down_proj": 3},
        alpha_pattern={"down_proj": 9},
        layers_to_transform=[1],
        init_lora_weights=False,
        lora_dropout=0.5,
        bias="none",
    )
    get_peft_model(base(), config).save_pretrained(str(tmp_path))
    expected = PeftModel.from_pretrained(base(), str(tmp_path)).merge_and_unload()
    model = load_policy(large_model_dir, adapter=Adapter(path=tmp_path))[0]
    matrices = {name: (tuple(value.shape), factor) for name, value, factor in adapter_parameters(model)}
    assert {shape[0] for name, (shape, _) in matrices.items() if ".lora_A." in name} == {2, 3}
    assert {round(factor, 4) for name, (_, factor) in matrices.items() if ".lora_B." in name} == {2.8284, 5.1962}
    merged = merged_state(model, model.state_dict())
    changed = []
    for name, value in base().state_dict().items():
        torch.testing.assert_close(merged[name], expected.state_dict()[name], atol=1e-6, rtol=1e-5)
        changed += [name] if not torch.equal(value, merged[name]) else []
    assert sorted(name.split(".layers.")[-1] for name in changed) == [
        "1.mlp.down_proj.weight",
        "1.self_attn.q_proj.weight",
    ]


def test_a_policy_has_no_dropout(model_dir: Path, tmp_path: Path, pack: PackedBatch, ranks: Ranks) -> None:
    """Actors have none, whatever a checkpoint or an adapter was trained with."""
    Policy(make_config(model_dir, lora_rank=2), ranks).export(tmp_path / "export")
    for file, name in (("adapter/adapter_config.json", "lora_dropout"), ("config.json", "attention_dropout")):
        path = tmp_path / "export" / file
        values = json.loads(path.read_text())
        (values if name in values else values["text_config"])[name] = 0.5
        path.write_text(json.dumps(values))
    export = tmp_path / "export"
    policy = Policy(make_config(export, lora_adapter_path=export / "adapter"), ranks)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    torch.testing.assert_close(logprobs(policy.model, pack), logprobs(policy.model, pack), atol=0, rtol=0)


def test_a_snapshot_without_adapter_is_the_plain_one(model_dir: Path) -> None:
    model = load_policy(model_dir, adapter=Adapter(rank=2))[0]
    taken = Snapshotter(model, [], is_sender=True, bucket_bytes=2**20).take(0)
    assert taken is not None
    assert {parameter.name for parameter in taken.frozen.parameters} == load_file(
        model_dir / "model.safetensors"
    ).keys()


def test_an_adapter_of_the_vision_tower_is_merged(model_dir: Path) -> None:
    model = load_policy(model_dir, adapter=Adapter(rank=2, target_modules=r".*\.(qkv|q_proj)"))[0]
    taken = Snapshotter(model, ["model.visual"], is_sender=True, bucket_bytes=2**20).take(0)
    assert taken is not None
    assert taken.adapter is not None
    assert "vision modules, as base_model.model.model.visual." in taken.adapter.merged_because
    assert taken.update(full=False, merged=True)[0].updates_vision


def full(parameter: Any) -> Tensor:
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach()


def is_adapted(name: str, module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and "visual" not in name and name != "lm_head"


def linear_layers(model: Any) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for name, m in model.named_modules() if is_adapted(name, m)]
