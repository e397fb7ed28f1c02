from pathlib import Path

import pytest

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
    (tmp_path / "model-00001-of-00002.safetensors").touch()
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
