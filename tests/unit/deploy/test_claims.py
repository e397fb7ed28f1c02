"""What is applied by itself to fill the claim of models and to read that of runs."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.manifests import policies
from tests.manifests.rendered import VARIANTS, Manifest, find, pod_templates, read, render, tool
from tests.manifests.runner.packet_filter import Opening, Peer, decide

FILES = ("loader.yaml", "reader.yaml", "download.yaml")
WITH_CLAIMS = [variant for variant in VARIANTS if variant[0] != "cpu-demo"]


def _pod(file: str) -> Any:
    [template] = pod_templates(read(file)).values()
    return template["spec"]


def _claims(spec: Manifest) -> list[Manifest]:
    return [volume["persistentVolumeClaim"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume]


def _of_pods(manifests: list[Manifest], claim: str) -> list[Manifest]:
    specs = [template["spec"] for template in pod_templates(manifests).values()]
    return [found for spec in specs for found in _claims(spec) if found["claimName"] == claim]


@pytest.mark.parametrize("file", FILES)
def test_each_is_confined_as_the_pods_of_a_run(file: str) -> None:
    manifests = read(file)
    assert policies.pods_are_confined(manifests) == []
    assert policies.names_are_plain(manifests) == []
    of_a_run = pod_templates(render("gpu"))["outrider-learner"]["spec"]["securityContext"]
    assert _pod(file)["securityContext"] == of_a_run


@pytest.mark.parametrize("variant", WITH_CLAIMS, ids="+".join)
def test_they_alone_write_the_models(variant: tuple[str, ...]) -> None:
    manifests = render(*variant)
    models = {"claimName": "outrider-models"}
    assert [_claims(_pod(file)) for file in ("loader.yaml", "download.yaml")] == [[models], [models]]
    assert find(manifests, "PersistentVolumeClaim", "outrider-models")["spec"]["accessModes"] == ["ReadWriteMany"]
    assert _of_pods(manifests, "outrider-models") == [{**models, "readOnly": True}] * 2
    # What `kubectl apply -l` makes before there is a pod.
    storage = [m for m in manifests if m["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "storage"]
    assert [(m["kind"], m["metadata"]["name"]) for m in storage] == [
        ("PersistentVolumeClaim", "outrider-models"),
        ("PersistentVolumeClaim", "outrider-runs"),
    ]


@pytest.mark.parametrize("variant", VARIANTS, ids="+".join)
def test_the_reader_reads_what_the_learner_writes(variant: tuple[str, ...]) -> None:
    assert _of_pods(render(*variant), "outrider-runs") == [{"claimName": "outrider-runs"}]
    assert _claims(_pod("reader.yaml")) == [{"claimName": "outrider-runs", "readOnly": True}]
    [container] = _pod("reader.yaml")["containers"]
    assert container["volumeMounts"][0] == {"name": "runs", "mountPath": "/runs", "readOnly": True}


def test_the_download_is_a_command_that_hf_takes(tmp_path: Path) -> None:
    """Offline it says that it would have to go to the Hub; a wrong option would be a mistake in its usage."""
    [container] = _pod("download.yaml")["containers"]
    program, *arguments = container["command"]
    [model] = [entry["value"] for entry in container["env"] if entry["name"] == "MODEL"]
    path = str(policies.learner_config(render("gpu")).model.path)
    assert {"$(MODEL)", path} <= set(arguments)
    command = [tool(program, "huggingface_hub brings it"), *arguments]
    command = [part.replace("$(MODEL)", model).replace(path, str(tmp_path / "policy")) for part in command]
    offline = {**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=offline)
    assert done.returncode == 1
    assert f"models/{model}/" in done.stderr
    assert "offline mode is enabled" in done.stderr


def test_the_download_reaches_name_servers_and_https_and_nobody_else() -> None:
    """Also beside a run, whose policies leave it what they leave every pod: the name servers."""
    manifests = read("download.yaml")
    policy = find(manifests, "NetworkPolicy")
    *names, internet = policy["spec"]["egress"]
    everywhere = {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}
    assert internet == {"to": [{"ipBlock": everywhere}], "ports": [{"protocol": "TCP", "port": 443}]}
    policy["spec"]["egress"] = names
    run = render("gpu")
    pod = Peer("10.0.0.1", find(manifests, "Job")["spec"]["template"]["metadata"]["labels"], "outrider")
    actor = Peer("10.0.0.2", pod_templates(run)["outrider-actor"]["metadata"]["labels"], "outrider")
    dns = Peer("10.0.0.3", {"k8s-app": "kube-dns"}, "kube-system")
    ask_names = [Opening(dns.address, protocol, 53, 53) for protocol in (6, 17)]
    beside = [manifest for manifest in run if manifest["kind"] == "NetworkPolicy"]
    for others in ([], beside):
        rules = decide([policy, *others], pod, [actor, dns])
        assert (rules.ingress, rules.egress) == ([], ask_names)
