"""What `make setup` installs, and from where, with a pip and an uv that write down what they are asked."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_TOOL = """#!/bin/sh
echo "${0##*/} $*" >>"$(dirname "$0")/asked"
echo "ERROR: nothing of the kind here" >&2
case "$*" in "install uv" | *%s*) exit 0;; *) exit 1;; esac
"""
# A `make test` hands its own variables on.
_OF_THE_CALLER = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "TORCH", "EXTRAS", "OUTRIDER_TORCH_INDEX"}
UV = "uv pip install --python {bin}/python --torch-backend cpu torch==2.13.0"


def setup(venv: Path, *variables: str, succeeds: str = "nothing") -> tuple[list[str], str]:
    """(what pip and uv were asked, standard error); installs of what is not called `succeeds` fail."""
    bin_dir = venv / "bin"
    bin_dir.mkdir(parents=True)
    for name in ("pip", "uv"):
        (bin_dir / name).write_text(_TOOL % succeeds)
        (bin_dir / name).chmod(0o755)
    result = make(venv, "EXTRAS=gpu", *variables)
    assert result.returncode != 0
    return (bin_dir / "asked").read_text().splitlines(), result.stderr


def make(venv: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    """`make setup` with that environment."""
    command = ["make", "setup", f"VENV={venv}", "OUTRIDER_TORCH_INDEX=", *variables]
    own = {name: value for name, value in os.environ.items() if name not in _OF_THE_CALLER}
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)


def test_where_pip_finds_no_cpu_build_uv_asks_pytorchs_index(tmp_path: Path) -> None:
    asked, _ = setup(tmp_path, succeeds="--torch-backend")
    assert asked[:3] == ["pip install uv", "pip install torch==2.13.0+cpu", UV.format(bin=tmp_path / "bin")]
    assert asked[3].startswith("uv pip install --quiet")  # on with the rest


def test_where_pip_finds_it_uv_does_not_look(tmp_path: Path) -> None:
    asked, _ = setup(tmp_path, succeeds="torch==2.13.0+cpu")
    assert asked[1] == "pip install torch==2.13.0+cpu"
    assert asked[2].startswith("uv pip install --quiet")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ((), ["pip install torch==2.13.0+cpu", UV]),
        # Whoever names an index has that one asked, and no other.
        (("OUTRIDER_TORCH_INDEX=mirror",), ["pip install --extra-index-url mirror torch==2.13.0+cpu"]),
        (("TORCH=torch",), ["pip install torch"]),  # with CUDA: never the CPU build in its place
    ],
)
def test_a_torch_that_nobody_has_is_one_line(tmp_path: Path, variables: tuple[str, ...], expected: list[str]) -> None:
    asked, stderr = setup(tmp_path, *variables)
    assert asked == ["pip install uv", *(line.format(bin=tmp_path / "bin") for line in expected)]
    said, _ = (line for line in stderr.splitlines() if line)  # the second is make's own
    assert said.startswith(f"No {expected[0].rpartition(' ')[2]} was found (details: {tmp_path}/setup.log).")
    assert "Set OUTRIDER_TORCH_INDEX" in said
    assert "nothing of the kind here" in (tmp_path / "setup.log").read_text()


def test_a_changed_pyproject_installs_what_was_installed_before(tmp_path: Path) -> None:
    """Not the CPU build over that for GPUs."""
    installed = tmp_path / ".installed"
    installed.write_text("EXTRAS=gpu,dev TORCH=torch\n")
    os.utime(installed, (0, 0))
    (tmp_path / "bin").mkdir()
    for name in ("pip", "uv"):
        (tmp_path / "bin" / name).write_text(_TOOL % "torch")
        (tmp_path / "bin" / name).chmod(0o755)
    make(tmp_path)
    asked = (tmp_path / "bin" / "asked").read_text().splitlines()
    assert asked[1] == "pip install torch"
    assert asked[2].endswith("-e .[gpu,dev]")


@pytest.mark.parametrize("variables", [("EXTRAS=gpu,dev", "TORCH=torch"), ("EXTRAS=gpu,dev",), ("TORCH=torch",)])
def test_another_build_over_the_first_one_is_refused_in_a_line(tmp_path: Path, variables: tuple[str, ...]) -> None:
    (tmp_path / ".installed").write_text("\n")  # the defaults
    for given, is_refused in (((), False), (("EXTRAS=cpu,dev", "TORCH=torch==2.13.0+cpu"), False), (variables, True)):
        result = make(tmp_path, *given)
        assert (result.returncode != 0) is is_refused
        assert ("say 'make clean' first" in result.stderr) is is_refused


def test_buf_is_beside_the_other_commands(tmp_path: Path) -> None:
    """A run ends with a line that calls it."""
    tools, venv = tmp_path / "tools", tmp_path / "venv"
    for path in (tools, venv / "bin"):
        path.mkdir(parents=True)
    place = venv / "npm" / "node_modules" / ".bin"
    (tools / "npm").write_text(
        f"#!/bin/sh\nmkdir -p {place}\nprintf '#!/bin/sh\\necho it is buf' >{place}/buf\nchmod +x {place}/buf\n"
    )
    (tools / "npm").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(["make", f"VENV={venv}", str(place / "buf")], cwd=ROOT, env=environment, check=True)
    assert subprocess.check_output([venv / "bin" / "buf"], text=True) == "it is buf\n"
