"""A checkpoint directory that transformers or PEFT has written, for everybody whom the umask lets read it."""

from pathlib import Path


def share_weights(directory: Path) -> None:
    """Give weights, at any depth, the mode of `config.json`: safetensors writes them for their owner alone."""
    mode = (directory / "config.json").stat().st_mode
    for path in directory.rglob("*.safetensors"):
        path.chmod(mode & 0o777)
