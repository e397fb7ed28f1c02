"""Rendered manifests against the schemas of Kubernetes, strictly, and against checkov's policies."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from kubernetes_validate.utils import all_versions

from tests.manifests.rendered import ALONE, K8S, VARIANTS, Manifest, find, read, render, render_text, tool

# checkov alone takes seconds, and more on a busy machine.
pytestmark = pytest.mark.timeout(300)

_SCHEMAS = Path(__file__).resolve().parents[2] / "manifests" / "schemas"
VERSIONS = sorted({version.rpartition(".")[0] for version in all_versions()}, key=lambda text: int(text.split(".")[1]))[
    -5:
]


def check(manifest: Manifest, version: str) -> None:
    """Raises an error of `kubernetes_validate` or `jsonschema` for an unknown kind or field, and for a wrong value."""
    supplied = _SCHEMAS / f"{manifest['kind'].lower()}.json"
    if supplied.is_file():
        jsonschema.validate(manifest, json.loads(supplied.read_text()))
        for job in manifest["spec"].get("replicatedJobs", ()):
            metadata = {"name": job["name"]}
            check({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, **job["template"]}, version)
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_five_versions_are_known() -> None:
    assert len(VERSIONS) == 5
    assert "1.37" in VERSIONS


@pytest.fixture(scope="module")
def manifests() -> list[Manifest]:
    """Those of all variants, each once: most are the same in several. And what is applied by itself."""
    rendered = [render(*variant) for variant in VARIANTS]
    assert all(len(manifests) > 15 for manifests in rendered)
    rendered += [read(path) for path in ALONE]
    return list({json.dumps(manifest): manifest for manifests in rendered for manifest in manifests}.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_follow_the_schemas(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        check(manifest, version)


def _break(manifest: Manifest, path: str, value: Any) -> Manifest:
    *parents, leaf = path.split(".")
    place = manifest
    for parent in parents:
        place = place[parent]
    place[leaf] = value
    return manifest


@pytest.mark.parametrize(
    ("variant", "kind", "path"),
    [
        (("gpu",), "Deployment", "spec.template.spec.enableServicelinks"),
        (("gpu", "keda"), "ScaledObject", "spec.minReplicas"),
        (("gpu", "monitoring"), "PodMonitor/outrider-actor", "spec.endpoints"),
        (("gpu", "jobset"), "JobSet", "spec.maxRestarts"),
    ],
)
def test_a_misspelt_field_is_an_error(variant: tuple[str, ...], kind: str, path: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=path.rpartition(".")[2]):
        check(_break(find(render(*variant), *kind.split("/")), path, 1), VERSIONS[-1])


def test_a_mistake_inside_a_jobset_is_an_error() -> None:
    jobset = find(render("gpu", "jobset"), "JobSet")
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] = "two"
    with pytest.raises(jsonschema.ValidationError, match="two"):
        check(jobset, VERSIONS[-1])


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        check({"apiVersion": "example.com/v1", "kind": "Surprise", "metadata": {"name": "x"}}, VERSIONS[-1])


@pytest.fixture(scope="module")
def checkov_report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rendered")
    for variant in VARIANTS:
        (folder / f"{'+'.join(variant)}.yaml").write_text(render_text(*variant))
    for path in ALONE:
        shutil.copy(K8S / path, folder)
    (folder / "broken.yaml").write_text(
        render_text("gpu").replace("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false")
    )
    checkov = tool("checkov", "`make setup` installs it")
    command = [checkov, "-d", folder, "--framework", "kubernetes", "--skip-download", "--output", "json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)["results"]
    return report


def test_checkov_finds_nothing(checkov_report: dict[str, Any]) -> None:
    failed = [
        f"{check['file_path']}: {check['check_id']} {check['check_name']} in {check['resource']}"
        for check in checkov_report["failed_checks"]
        if check["file_path"] != "/broken.yaml"
    ]
    assert failed == []


def test_checkov_has_looked(checkov_report: dict[str, Any]) -> None:
    broken = {
        (check["check_id"], check["resource"].split(".")[0])
        for check in checkov_report["failed_checks"]
        if check["file_path"] == "/broken.yaml"
    }
    assert broken == {("CKV_K8S_22", "Deployment"), ("CKV_K8S_22", "Job")}
    looked_at = {check["file_path"] for check in checkov_report["passed_checks"] if check["check_id"] == "CKV_K8S_22"}
    assert {"/loader.yaml", "/reader.yaml", "/download.yaml"} <= looked_at


def test_checks_that_are_skipped_say_why(checkov_report: dict[str, Any]) -> None:
    skipped = {
        check["check_id"]: check["check_result"]["suppress_comment"] for check in checkov_report["skipped_checks"]
    }
    assert set(skipped) == {"CKV_K8S_15", "CKV_K8S_43"}
    assert all(len(reason.split()) > 5 for reason in skipped.values())
