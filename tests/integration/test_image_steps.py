"""The steps of the images' build stages, run as a script in an empty folder: it takes no Docker engine."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.manifests.rendered import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# The CPU build, which is what this machine can import.
_ARGUMENTS = {"TORCH": "torch==2.13.0+cpu", "TORCH_INDEX": os.environ.get("OUTRIDER_TORCH_INDEX", "")}


def _instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Those of the first stage, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE))
    stage = re.split(r"^FROM .*$", text, flags=re.MULTILINE)[1]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in stage.splitlines() if line]


def _build(dockerfile: Path, folder: Path) -> Path:
    """Run the build stage with /opt/venv and /src below `folder`; the virtual environment."""
    context = folder / "src"
    script = ["set -euo pipefail", f"export PATH={sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin"]
    for name, rest in _instructions(dockerfile):
        if name == "ARG":
            key, _, default = rest.partition("=")
            script.append(f"{key}={shlex.quote(_ARGUMENTS.get(key, default))}")
        elif name == "ENV":
            script.append(f"export {rest}")
        elif name == "WORKDIR":
            script.append(f"mkdir -p {rest} && cd {rest}")
        elif name == "COPY":
            *sources, target = rest.split()
            script += [f"cp -rT {ROOT}/{source} {target}" for source in sources if (ROOT / source).is_dir()]
            script += [f"cp {ROOT}/{source} {target}" for source in sources if (ROOT / source).is_file()]
        elif name == "RUN":
            script.append(rest)
        else:
            assert name == "SHELL", name
    text = (
        "\n".join(script)
        .replace("/opt/venv", str(folder / "venv"))
        .replace("/src\n", f"{context}\n")
        .replace("/src &&", f"{context} &&")
    )
    # Of this environment only what says where packages come from.
    kept = {
        name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "HTTP", "http", "SSL_"))
    }
    done = subprocess.run(
        ["bash", "-c", text], check=False, capture_output=True, text=True, env={**kept, "HOME": str(folder)}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / "venv"


def _python(environment: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [environment / "bin" / "python", "-c", code]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd="/", env={"PATH": "/usr/bin"})


@pytest.mark.parametrize(("image", "has_vllm"), [("learner", False), ("actor-cpu", True)])
def test_the_build_stage_makes_an_environment_that_works(tmp_path: Path, image: str, has_vllm: bool) -> None:
    environment = _build(ROOT / "deploy" / "images" / f"{image}.Dockerfile", tmp_path)
    role = image.partition("-")[0]
    shown = subprocess.run(
        [environment / "bin" / f"outrider-{role}", "--help"],
        check=True,
        capture_output=True,
        text=True,
        cwd="/",
        env={},
    )
    assert f"python -m {role}" in shown.stdout
    traces = "from common import tracing; tracing.start('image')"
    code = f"import learner.run, math_verify; {traces}" if role == "learner" else f"import actor.process; {traces}"
    imported = _python(environment, code)
    assert imported.returncode == 0, imported.stderr
    found = _python(environment, "import importlib.util; print(importlib.util.find_spec('vllm') is not None)")
    assert found.stdout.strip() == str(has_vllm), found.stderr
    shutil.rmtree(tmp_path)
