"""Whether a directory is a checkpoint that learner and actors can load, from its files alone."""

import json
import re
from pathlib import Path

from common.config import ConfigError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_checkpoint(path: Path, key: str) -> Path:
    """`path`, if it looks like a checkpoint in Hugging Face format: `config.json` and safetensors.

    Raises ConfigError, which names the `key` of the configuration.
    """
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{key}: {path} holds no checkpoint (config.json); give a directory in Hugging Face format, as "
            f"{download_command(path)} makes it of a model of the hub"
        )
    try:
        json.loads((path / "config.json").read_bytes())
    except ValueError:
        raise ConfigError(f"{key}: {path / 'config.json'} is not JSON; the checkpoint is damaged") from None
    if not any(path.glob("*.safetensors")):
        raise ConfigError(f"{key}: {path} has no *.safetensors file; other weight formats are not loaded")
    return path


def download_command(path: Path) -> str:
    """How a model of the hub becomes a directory: with its name, if `path` can only be one.

    Example: `hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir DIRECTORY`.
    """
    is_name = _HUB_NAME.fullmatch(str(path)) is not None and not path.parent.exists()
    return f"`hf download {path if is_name else 'NAME'} --local-dir DIRECTORY`"
