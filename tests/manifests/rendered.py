"""Manifests as `kubectl kustomize` renders them: the overlays, and overlays with components."""

import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from os.path import relpath
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "deploy" / "k8s"

Manifest = dict[str, Any]

# Every overlay, and every component on an overlay that it makes sense on.
VARIANTS = (
    ("cpu-demo",),
    ("gpu",),
    ("gpu-multinode",),
    ("gpu", "hpa", "monitoring"),
    ("gpu", "keda", "monitoring"),
    ("gpu", "spot-actors"),
    ("gpu", "priority"),
    ("gpu", "tracing"),
    ("cpu-demo", "monitoring"),
    ("cpu-demo", "mtls"),
    ("gpu-multinode", "mtls"),
    ("gpu-multinode", "jobset"),
)

# What is applied by itself, and is in no overlay.
ALONE = ("loader.yaml", "reader.yaml", "download.yaml", "components/priority/priority-class.yaml")


def tool(name: str, hint: str) -> str:
    """The path of a program of this environment or of the system, or a failure that says how to get it."""
    path = shutil.which(
        name, path=os.pathsep.join([f"{sys.prefix}/bin", f"{sys.prefix}/checkov/bin", os.environ["PATH"]])
    )
    if path is None:
        pytest.fail(f"{name} is not installed: {hint}", pytrace=False)
    return path


@cache
def _render_text(overlay: str, *components: str) -> str:
    return _render_own_text(overlay, components, {}, {}) if components else kustomize(K8S / "overlays" / overlay)


def _render_own_text(
    overlay: str, components: Sequence[str], config: dict[str, dict[str, str]], more: dict[str, Any]
) -> str:
    with tempfile.TemporaryDirectory() as made:
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [relpath(K8S / "overlays" / overlay, made)],
            "components": [relpath(K8S / "components" / name, made) for name in components],
            "configMapGenerator": [
                {"name": name, "behavior": "merge", "files": list(files)} for name, files in config.items()
            ],
        }
        for files in config.values():
            for file, text in files.items():
                (Path(made) / file).write_text(text)
        (Path(made) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization | more))
        return kustomize(Path(made))


def kustomize(folder: Path) -> str:
    """What `kubectl apply -k` would apply."""
    kubectl = tool(
        "kubectl", "the tests of deploy/ render the manifests with it; see https://kubernetes.io/docs/tasks/tools/"
    )
    done = subprocess.run([kubectl, "kustomize", folder], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(overlay: str, *components: str) -> list[Manifest]:
    """A fresh copy of what would be applied."""
    return copy.deepcopy(_render(overlay, *components))


@cache
def _render(overlay: str, *components: str) -> list[Manifest]:
    return list(yaml.safe_load_all(_render_text(overlay, *components)))


def render_own(
    overlay: str, *components: str, config: dict[str, dict[str, str]] | None = None, **more: Any
) -> list[Manifest]:
    """A kustomization of a user's own on top of an overlay, as docs/deploy.md has it.

    Args:
        overlay: what it is on top of.
        components: added to it.
        config: files by the ConfigMap that they go into, as `{"outrider-run": {"run.yaml": "name: mine"}}`.
        more: further keys of the kustomization.
    """
    return list(yaml.safe_load_all(_render_own_text(overlay, components, config or {}, more)))


def render_text(overlay: str, *components: str) -> str:
    """The same as text."""
    return _render_text(overlay, *components)


def read(path: str) -> list[Manifest]:
    """One of `ALONE`."""
    return list(yaml.safe_load_all((K8S / path).read_text()))


def find(manifests: list[Manifest], kind: str, name: str = "") -> Manifest:
    """The one of this kind, and of this name if one is given."""
    [found] = [
        manifest for manifest in manifests if manifest["kind"] == kind and name in ("", manifest["metadata"]["name"])
    ]
    return found


def config_data(manifests: list[Manifest], file: str) -> dict[str, str]:
    """The data of the ConfigMap that has this file."""
    maps: list[dict[str, str]] = [manifest["data"] for manifest in manifests if manifest["kind"] == "ConfigMap"]
    [data] = [data for data in maps if file in data]
    return data


def pod_templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Pod templates by the name of what makes the pods; those of a JobSet too, and pods themselves."""
    templates = {}
    for manifest in manifests:
        if manifest["kind"] in ("Deployment", "Job"):
            templates[manifest["metadata"]["name"]] = manifest["spec"]["template"]
        elif manifest["kind"] == "JobSet":
            [job] = manifest["spec"]["replicatedJobs"]
            templates[manifest["metadata"]["name"]] = job["template"]["spec"]["template"]
        elif manifest["kind"] == "Pod":
            templates[manifest["metadata"]["name"]] = manifest
    return templates


def containers(template: Manifest, *, init: bool = True) -> list[Manifest]:
    """Containers of a pod template, those that run first included."""
    spec = template["spec"]
    return [*(spec.get("initContainers", []) if init else []), *spec["containers"]]
