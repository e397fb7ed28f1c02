"""Whether a directory is a checkpoint that learner and actors can load, from its files alone."""

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.config import ConfigError

_IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
_LFS_POINTER = b"version https://git-lfs"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_checkpoint(path: Path, key: str) -> Path:
    """`path`, if it looks like a checkpoint in Hugging Face format: `config.json`, processor, and whole safetensors.

    Raises ConfigError, which names the `key` of the configuration.
    """
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{key}: {path} holds no checkpoint (config.json); give a directory in Hugging Face format, as "
            f"{download_command(path)} makes it of a model of the hub"
        )
    try:
        has_vision = "vision_config" in json.loads((path / "config.json").read_bytes())
    except (ValueError, TypeError):
        raise ConfigError(f"{key}: {path / 'config.json'} is not JSON; the checkpoint is damaged") from None
    if has_vision:
        _check_processor(path, key)
    for shard in _shards(path, key):
        _check_shard(shard, key)
    return path


def _check_processor(path: Path, key: str) -> None:
    """What `model.save_pretrained` alone leaves out."""
    for what, names in (("image processor", _IMAGE_PROCESSORS), ("tokenizer", _TOKENIZERS)):
        if not any((path / name).is_file() for name in names):
            raise ConfigError(
                f"{key}: {path} has no {what} ({' or '.join(names[:2])}); save the processor there, too: "
                "`AutoProcessor.from_pretrained(ORIGINAL).save_pretrained(DIRECTORY)`"
            )


def _shards(path: Path, key: str) -> list[Path]:
    """The files of the weights: those of the index, or all where there is none."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        if shards := sorted(path.glob("*.safetensors")):
            return shards
        raise ConfigError(f"{key}: {path} has no *.safetensors file; other weight formats are not loaded")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError):
        raise ConfigError(f"{key}: {index} is no index of shards; the checkpoint is damaged") from None
    if missing := [name for name in names if not (path / name).is_file()]:
        raise ConfigError(
            f"{key}: {path} lacks {len(missing)} of {len(names)} files that its index names ({missing[0]}); "
            f"complete it, as {download_command(path)} does"
        )
    return [path / name for name in names]


def _check_shard(shard: Path, key: str) -> None:
    """Its header fits its size. Reads no tensor."""
    try:
        with safe_open(shard, "numpy"):
            pass
    except OSError as error:
        raise ConfigError(f"{key}: {shard} cannot be read ({error})") from None
    except SafetensorError as error:
        with shard.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        cure = "it is a pointer of Git LFS: `git lfs pull` brings the file" if is_pointer else "download it again"
        raise ConfigError(f"{key}: {shard} is no whole safetensors file ({error}); {cure}") from None


def download_command(path: Path) -> str:
    """How a model of the hub becomes a directory: with its name, if `path` can only be one.

    Example: `hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir DIRECTORY`.
    """
    is_name = _HUB_NAME.fullmatch(str(path)) is not None and not path.parent.exists()
    return f"`hf download {path if is_name else 'NAME'} --local-dir DIRECTORY`"
