"""The peers' own virtual environment, `.venv-peers` in the checkout: built by the first benchmark that needs it."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.harness import say

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-peers"
REQUIREMENTS = Path(__file__).with_name("requirements-peers.txt")


def python() -> Path:
    """Path of the peers' interpreter. Raises `subprocess.CalledProcessError` if pip fails."""
    interpreter = FOLDER / "bin" / "python"
    stamp = FOLDER / "installed.txt"
    wanted = f"torch=={_torch_version()}\n{REQUIREMENTS.read_text()}"
    if not stamp.is_file() or stamp.read_text() != wanted:
        say(f"installing the peers into {FOLDER.name} (about two minutes, once)")
        shutil.rmtree(FOLDER, ignore_errors=True)
        venv.create(FOLDER, with_pip=True)
        index = os.environ.get("OUTRIDER_TORCH_INDEX")
        options = ["--extra-index-url", index] if index else []
        # The same build of torch on both sides.
        packages = [f"torch=={_torch_version()}", "-r", str(REQUIREMENTS)]
        subprocess.run([interpreter, "-m", "pip", "install", "-q", *options, *packages], check=True, stdout=sys.stderr)
        # The CUDA build of torchvision brings it along on machines without a GPU; PyTorch would then look for a driver.
        subprocess.run([interpreter, "-m", "pip", "uninstall", "-q", "-y", "triton"], check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return interpreter


def _torch_version() -> str:
    import torch

    return torch.__version__
