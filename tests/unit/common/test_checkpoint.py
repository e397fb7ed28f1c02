from pathlib import Path

import pytest

from common.checkpoint import check_checkpoint
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
