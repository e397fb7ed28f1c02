"""Environments of the peers in the checkout, built when a benchmark needs them."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.harness import say

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-peers"
GRPC_FOLDER = ROOT / ".venv-peers-grpc"
GRPC_PACKAGES = ("smg-grpc-servicer==0.14.1", "smg-grpc-proto==0.4.28")
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


def grpc_servicer() -> Path:
    """A folder for `PYTHONPATH` with vLLM's gRPC servicer, which must run beside our vLLM.

    Two packages of Python alone, so that they change nothing in this environment. Raises as `python` does.
    """
    stamp = GRPC_FOLDER / "installed.txt"
    wanted = "\n".join(GRPC_PACKAGES)
    if not stamp.is_file() or stamp.read_text() != wanted:
        say(f"installing vLLM's gRPC servicer into {GRPC_FOLDER.name}")
        shutil.rmtree(GRPC_FOLDER, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(GRPC_FOLDER)]
        subprocess.run([*command, *GRPC_PACKAGES], check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return GRPC_FOLDER


def _torch_version() -> str:
    import torch

    return torch.__version__
