"""docs/deploy.md and docs/operations.md hold: what they render, the files, alerts and numbers that they name."""

import re
from os.path import relpath
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests import policies
from tests.manifests.rendered import K8S, ROOT, Manifest, containers, find, kustomize, pod_templates, render, render_own

DEPLOY, OPERATIONS = ((ROOT / "docs" / name).read_text() for name in ("deploy.md", "operations.md"))
WHOLE, *FURTHER_DOWN = [
    yaml.safe_load(block)
    for block in re.findall(r"```yaml\n(.+?)```", DEPLOY + OPERATIONS, re.DOTALL)
    if block.startswith("# my-run/kustomization.yaml")
]


def _render(folder: Path, more: Manifest) -> list[Manifest]:
    """What the user's folder makes, with what comes further down in it."""
    lists = {key: [*WHOLE.get(key, ()), *value] for key, value in more.items() if key != "configMapGenerator"}
    made: Any = yaml.safe_dump(WHOLE | more | lists)
    (folder / "kustomization.yaml").write_text(made.replace("../deploy", relpath(ROOT / "deploy", folder)))
    for file in ("run.yaml", "actor.yaml"):
        (folder / file).write_text((K8S / "overlays" / "gpu" / file).read_text())
    (folder / "my_rewards.py").write_text("def reward(**_): return 0.0\n")
    return list(yaml.safe_load_all(kustomize(folder)))


@pytest.mark.parametrize("more", [{}, *FURTHER_DOWN], ids=str)
def test_what_a_user_writes_renders_and_holds_the_rules(tmp_path: Path, more: Manifest) -> None:
    rendered = _render(tmp_path, more)
    assert [problem for rule in policies.RULES for problem in rule(rendered)] == []
    assert more == {} or rendered != _render(tmp_path, {})


def test_ranks_of_the_learner_share_the_cpus_of_their_pod(tmp_path: Path) -> None:
    """Also of other sizes: torchrun gives several ranks one thread each, and one rank all cores of the node."""
    [other_sizes] = [more for more in FURTHER_DOWN if "PET_NPROC_PER_NODE" in str(more)]
    for manifests in (render("gpu"), render("gpu-multinode"), _render(tmp_path, other_sizes)):
        [container] = containers(pod_templates(manifests)["outrider-learner"], init=False)
        variables = {entry["name"]: entry.get("value") for entry in container["env"]}
        threads, ranks = int(variables["OMP_NUM_THREADS"]), int(variables["PET_NPROC_PER_NODE"])
        assert threads * ranks == int(container["resources"]["limits"]["cpu"])


def test_a_second_run_has_a_namespace_of_its_own() -> None:
    rendered = render_own("gpu", "keda", "monitoring", "mtls", "tracing", "priority", namespace="second")
    assert {manifest["metadata"].get("namespace", manifest["kind"]) for manifest in rendered} == {"second", "Namespace"}
    assert find(rendered, "Namespace")["metadata"]["name"] == "second"


def test_the_table_says_what_overlays_request() -> None:
    said = {
        overlay: (total, largest)
        for overlay, total, largest in re.findall(
            r"^\| `([a-z-]+)` \| [^|]+ \| (.+ GiB.*) \| (.+) \|$", DEPLOY, re.MULTILINE
        )
    }
    assert said == {overlay: _sizes(render(overlay)) for overlay in ("cpu-demo", "gpu", "gpu-multinode")}


def _sizes(manifests: list[Manifest]) -> tuple[str, str]:
    """What all pods request, and the largest of them; init containers request less than what runs after them."""
    pods = []
    for name, template in pod_templates(manifests).items():
        [container] = containers(template, init=False)
        requests = container["resources"]["requests"]
        size = (
            int(requests["cpu"]),
            int(requests["memory"].removesuffix("Gi")),
            int(requests.get("nvidia.com/gpu", 0)),
        )
        [spec] = [
            manifest["spec"]
            for manifest in manifests
            if "template" in manifest.get("spec", {}) and manifest["metadata"]["name"] == name
        ]
        pods += [size] * spec.get("replicas", spec.get("parallelism"))
    total = tuple(sum(values) for values in zip(*pods, strict=True))
    return _words(*total), _words(*max(pods, key=lambda size: (size[2], size[1])))


def _words(cpus: int, gib: int, gpus: int) -> str:
    return f"{cpus} CPU{'s' if cpus > 1 else ''}, {gib} GiB" + (f", {gpus} GPUs" if gpus else "")


def test_each_alert_is_a_symptom() -> None:
    [rules] = [manifest for manifest in render_own("gpu", "monitoring") if manifest["kind"] == "PrometheusRule"]
    alerts = {rule["alert"] for group in rules["spec"]["groups"] for rule in group["rules"]}
    symptoms = OPERATIONS.partition("## Symptoms")[2].partition("\n#")[0]
    assert set(re.findall(r"`(Outrider\w+)`", symptoms)) == alerts


def test_files_that_commands_name_are_there() -> None:
    files = set(re.findall(r"kubectl (?:apply|delete) -f (\S+\.yaml)", DEPLOY + OPERATIONS))
    assert {"deploy/k8s/loader.yaml", "deploy/k8s/reader.yaml", "deploy/k8s/download.yaml"} <= files
    assert [file for file in files if not (ROOT / file).is_file()] == []
