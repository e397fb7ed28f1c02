import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.checkpoint import check_checkpoint, download_command
from common.config import ConfigError


def test_a_checkpoint_has_a_config_and_safetensors(tmp_path: Path) -> None:
    for path in (tmp_path / "no", tmp_path):
        with pytest.raises(ConfigError, match=rf"^model: {path} holds no checkpoint \(config\.json\); give"):
            check_checkpoint(path, "model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        check_checkpoint(tmp_path, "model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no \*\.safetensors file"):
        check_checkpoint(tmp_path, "model")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    assert check_checkpoint(tmp_path, "model") == tmp_path


def _shards(path: Path, *, num: int, of: int) -> list[str]:
    names = [f"model-{i:05}-of-{of:05}.safetensors" for i in range(1, of + 1)]
    (path / "config.json").write_text("{}")
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {f"layers.{i}": name for i, name in enumerate(names)}})
    )
    for name in names[:num]:
        save_file({"x": np.zeros(3, np.float32)}, path / name)
    return names


def test_every_shard_that_the_index_names_is_there(tmp_path: Path) -> None:
    """Else a download that was broken off is told by vLLM, a hundred lines into its log."""
    names = _shards(tmp_path, num=2, of=2)
    assert check_checkpoint(tmp_path, "model") == tmp_path
    (tmp_path / "consolidated.safetensors").touch()  # which nobody loads beside the index
    assert check_checkpoint(tmp_path, "model") == tmp_path
    (tmp_path / names[1]).unlink()
    with pytest.raises(ConfigError, match=rf"^model: .* lacks 1 of 2 files .* \({names[1]}\); .*`hf download NAME"):
        check_checkpoint(tmp_path, "model")
    (tmp_path / "model.safetensors.index.json").write_text("[")
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json is no index"):
        check_checkpoint(tmp_path, "model")


@pytest.mark.parametrize("damage", ["empty", "cut off", "header", "pointer"])
def test_a_shard_is_whole(tmp_path: Path, damage: str) -> None:
    shard = tmp_path / _shards(tmp_path, num=3, of=3)[1]
    data = bytearray(shard.read_bytes())
    if damage == "header":
        data[9] ^= 0xFF
    shard.write_bytes(
        {"empty": b"", "cut off": data[:-1], "header": data, "pointer": b"version https://git-lfs.github.com/spec/v1"}[
            damage
        ]
    )
    with pytest.raises(
        ConfigError, match=r"^model: .*00002-of-00003\.safetensors is no whole safetensors file"
    ) as error:
        check_checkpoint(tmp_path, "model")
    assert ("git lfs pull" in str(error.value)) == (damage == "pointer")


@pytest.mark.parametrize("has_all_in_one", [False, True])
def test_a_model_with_vision_has_its_processor(tmp_path: Path, has_all_in_one: bool) -> None:
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"vision_config": {}}')
    with pytest.raises(ConfigError, match=r"has no image processor \(preprocessor_config\.json or processor_config"):
        check_checkpoint(tmp_path, "model")
    (tmp_path / ("processor_config.json" if has_all_in_one else "preprocessor_config.json")).touch()
    with pytest.raises(
        ConfigError, match=r"has no tokenizer \(tokenizer\.json or tokenizer\.model\); save the processor"
    ):
        check_checkpoint(tmp_path, "model")
    (tmp_path / "tokenizer.json").touch()
    assert check_checkpoint(tmp_path, "model") == tmp_path


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("models/my-vlm", "NAME"),  # there is such a folder
        ("/models/my-vlm", "NAME"),
        ("../my-vlm", "NAME"),
        ("my-vlm", "NAME"),
        ("no/such/place", "NAME"),
        ("no/such place", "NAME"),
    ],
)
def test_what_can_only_be_a_name_is_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert download_command(Path(path)) == f"`hf download {name} --local-dir DIRECTORY`"
