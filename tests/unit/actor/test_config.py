from pathlib import Path

import pytest
from safetensors.numpy import save_file

from actor.config import ActorConfig, VllmConfig, check_model, parse_cores
from common.config import ConfigError, load_config
from tests.helpers.settings import num_keys, undocumented_keys

ROOT = Path(__file__).resolve().parents[3]


def test_every_key_has_a_docstring_below_it() -> None:
    assert undocumented_keys([ROOT / "actor/config.py"]) == (num_keys(ActorConfig), [])


def test_model_directory_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model: is missing"):
        check_model(None)
    with pytest.raises(ConfigError, match=r"^model: .* holds no checkpoint \(config\.json\)"):
        check_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    save_file({}, tmp_path / "model-00001-of-00002.safetensors")
    assert check_model(tmp_path) == tmp_path


def test_limits_that_clients_see_are_those_of_the_engine() -> None:
    config = load_config(ActorConfig, None, ["engine=fake", "fake.max_images=3", "limits.max_group_size=5"])
    limits = config.server_limits(max_context_tokens=77)
    assert (limits.max_media_items, limits.max_group_size, limits.max_context_tokens) == (3, 5, 77)
    assert limits.max_media_bytes == 32 * 2**20
    assert load_config(ActorConfig, None, ["vllm.max_images=2"]).server_limits(1).max_media_items == 2


def test_cores() -> None:
    assert parse_cores("0") == {0}
    assert parse_cores("0-1,3") == {0, 1, 3}
    with pytest.raises(ValueError, match="cpu_cores"):
        VllmConfig(cpu_cores="all")
