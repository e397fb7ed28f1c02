"""What is played with the runner. Each scenario is a process of its own, which becomes a node: `run` starts one.

    python -m tests.manifests.scenarios NAME FOLDER

A scenario writes what it has seen to FOLDER/seen.json; the tests judge it. Exit code 3: namespaces are not permitted.
"""

import asyncio
import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.manifests.rendered import ROOT, Manifest, config_data, find, render
from tests.manifests.runner.cluster import Cluster, enter_node
from tests.manifests.runner.network import METADATA, Network
from tests.manifests.runner.pod import Pod

_NOT_PERMITTED = 3
_ACTOR = "outrider-actor"
_LEARNER = "outrider-learner-0"
# One actor's or learner's way from nothing to work, on a machine that is busy with others.
_LOAD_S = 400
# A step in a fraction of a second, and no end that would come before the scenario's.
_SMALL_STEPS = {
    "batch_prompts: 64": "batch_prompts: 8",
    "n: 16": "n: 4",
    "total_steps: 120": "total_steps: 100000",
    "eval_every: 20": "eval_every: 0",
    "lr: 1.0e-3": "lr: 1.0e-6",
    "checkpoint_every: 20": "checkpoint_every: 2",
}


def play(name: str, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Play a scenario in a process of its own; what it has seen."""
    command = [sys.executable, "-m", "tests.manifests.scenarios", name, str(folder)]
    try:
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{error}\n{_logs(folder)}", pytrace=False)
    if done.returncode == _NOT_PERMITTED:
        reason = f"the manifests cannot be executed: {done.stderr.strip()}"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    if done.returncode:
        pytest.fail(f"{done.stdout}\n{done.stderr}\n{_logs(folder)}", pytrace=False)
    seen: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return seen


def _logs(folder: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in folder.rglob("*.log"))


def _summary(pod: Pod) -> dict[str, Any]:
    return {
        "name": pod.name,
        "phase": pod.phase,
        "restarts": pod.restarts,
        "codes": [ending.code for ending in pod.endings],
        "was_killed": any(ending.was_killed for ending in pod.endings),
    }


# ------------------------------------------------------------------------------------------------------ scenarios


async def confinement(folder: Path, network: Network) -> dict[str, Any]:
    """Actors of cpu-demo with the fake engine; pods beside them that try what they should and should not."""
    manifests = [manifest for manifest in render("cpu-demo") if manifest["kind"] != "Job"]
    _use_fake_engine(find(manifests, "Deployment", _ACTOR))
    template = find(manifests, "Deployment", _ACTOR)["spec"]["template"]
    cluster = Cluster(manifests, folder, network)
    metadata = await asyncio.start_server(lambda *_: None, METADATA, 80)
    await cluster.apply()
    await cluster.until(lambda: _num_ready(cluster) == 2, 90, "two actors are ready")
    actor, other = cluster.replicas(_ACTOR)
    targets = [[actor.address, 50051], [actor.address, 9090], [METADATA, 80]]
    names = ["outrider-actors", "outrider-actors-ready"]
    seen: dict[str, Any] = {"targets": targets, "addresses": sorted(pod.address for pod in (actor, other))}
    for kind, labels in {
        "stranger": {"app": "stranger"},
        "client": {"outrider.dev/client": "true"},
        "actor": template["metadata"]["labels"],
    }.items():
        seen[kind] = await _look_around(cluster, kind, template, labels, targets, names)
    policies = [manifest for manifest in manifests if manifest["kind"] == "NetworkPolicy"]
    for policy in policies:
        manifests.remove(policy)
    seen["without_policies"] = await _look_around(cluster, "open", template, {"app": "open"}, targets, names)
    manifests += policies
    await cluster.scale(_ACTOR, 4)
    await cluster.until(lambda: _num_ready(cluster) == 4, 90, "four actors are ready")
    seen["scaled_up"] = len(cluster.names()["outrider-actors-ready.outrider.svc.cluster.local"])
    await cluster.scale(_ACTOR, 1)
    seen["ready_at_once"] = len(cluster.names()["outrider-actors-ready.outrider.svc.cluster.local"])
    await cluster.until(lambda: len(cluster.pods) == 1, 90, "one actor is left")
    cluster.replicas(_ACTOR)[0].kill()
    await cluster.until(lambda: cluster.pods[0].restarts == 1 and cluster.pods[0].ready, 90, "it has come back")
    await cluster.close()
    metadata.close()
    seen["actors"] = [_summary(pod) for pod in cluster.all_pods if pod.name.startswith(_ACTOR)]
    return seen


async def demo(folder: Path, network: Network) -> dict[str, Any]:
    """cpu-demo in small steps without end: 1, 2 and 1 actors, a rolling update; the Job is deleted and comes back."""
    manifests = render("cpu-demo")
    find(manifests, "Deployment", _ACTOR)["spec"]["replicas"] = 1
    _take_small_steps(manifests)
    cluster = Cluster(manifests, folder, network)
    await cluster.apply()
    await cluster.until(lambda: _steps(folder) >= 1, _LOAD_S, "the first step is done")
    seen: dict[str, Any] = {"steps_at": [_steps(folder)]}
    for size in (2, 1):
        await cluster.scale(_ACTOR, size)
        await cluster.until(lambda size=size: _num_ready(cluster) == size, _LOAD_S, f"{size} actors are ready")
        seen["steps_at"].append(await _further_steps(cluster, folder))
    await cluster.roll(_ACTOR, {"kubectl.kubernetes.io/restartedAt": "now"}, _LOAD_S)
    seen["steps_at"].append(await _further_steps(cluster, folder))
    [learner] = [pod for pod in cluster.pods if pod.name == _LEARNER]
    await cluster.delete_job("outrider-learner")
    seen["steps_at"].append(_steps(folder))
    await cluster.apply_job("outrider-learner")
    await cluster.until(lambda: _resumed_at(cluster, learner), _LOAD_S, "the run is resumed")
    seen["resumed_at"] = _resumed_at(cluster, learner)
    seen["steps_at"].append(await _further_steps(cluster, folder))
    await cluster.close()
    return seen | {"steps": _lines(folder), "pods": [_summary(pod) for pod in cluster.all_pods]}


async def mistake(folder: Path, network: Network) -> dict[str, Any]:
    """The learner of cpu-demo alone, with a key in run.yaml that does not exist."""
    manifests = render("cpu-demo")
    find(manifests, "Deployment", _ACTOR)["spec"]["replicas"] = 0
    config_data(manifests, "run.yaml")["run.yaml"] += "batch_promts: 8\n"
    del find(manifests, "Job")["spec"]["template"]["spec"]["initContainers"]  # the mistake is found without a model
    cluster = Cluster(manifests, folder, network)
    await cluster.apply()
    await cluster.until(lambda: cluster.all_pods and not cluster.pods, _LOAD_S, "the Job is over")
    await cluster.close()
    return {"pods": [_summary(pod) for pod in cluster.all_pods], "log": cluster.all_pods[0].log("learner")}


async def mutual_tls(folder: Path, network: Network) -> dict[str, Any]:
    """cpu-demo with certificates, in small steps: they are renewed, and a second actor comes with the new ones."""
    manifests = render("cpu-demo", "mtls")
    find(manifests, "Deployment", _ACTOR)["spec"]["replicas"] = 1
    _take_small_steps(manifests)
    cluster = Cluster(manifests, folder, network)
    await cluster.apply()
    await cluster.until(lambda: _steps(folder) >= 1, _LOAD_S, "the first step is done")
    seen: dict[str, Any] = {"steps_at": [_steps(folder)]}
    cluster.renew_certificates()
    seen["steps_at"].append(await _further_steps(cluster, folder))
    await cluster.scale(_ACTOR, 2)
    await cluster.until(lambda: _num_ready(cluster) == 2, _LOAD_S, "two actors are ready")
    seen["steps_at"].append(await _further_steps(cluster, folder))
    fleet = ["python", "-m", "learner", "fleet"]
    targets = ["dns:///outrider-actors:50051"]
    template = find(manifests, "Deployment", _ACTOR)["spec"]["template"]
    seen["plaintext"] = await _run_client(cluster, "plaintext", template, [*fleet, *targets])
    seen["reader"] = await _run_client(cluster, "reader", template, [*fleet, "--tls", "/etc/outrider-tls", *targets])
    seen["addresses"] = sorted(pod.address for pod in cluster.replicas(_ACTOR))
    await cluster.close()
    return seen | {"steps": _lines(folder), "pods": [_summary(pod) for pod in cluster.all_pods]}


async def whole_demo(folder: Path, network: Network) -> dict[str, Any]:
    """All of cpu-demo; two more actors after the first step, and one is left of the four when half of it is done."""
    cluster = Cluster(render("cpu-demo"), folder, network)
    await cluster.apply()
    await cluster.until(lambda: _steps(folder) >= 1, _LOAD_S, "the first step is done")
    await cluster.scale(_ACTOR, 4)
    await cluster.until(lambda: _steps(folder) >= 60, 1200, "half of the run is done")
    await cluster.scale(_ACTOR, 1)
    await cluster.until(lambda: _LEARNER not in {pod.name for pod in cluster.pods}, 1200, "the run is over")
    await cluster.close()
    [run_dir] = (folder / "claims" / "outrider-runs").glob("digits-*")
    summary = json.loads((run_dir / "summary.json").read_text())
    return {"summary": summary, "steps": _lines(folder), "pods": [_summary(pod) for pod in cluster.all_pods]}


SCENARIOS: dict[str, Callable[[Path, Network], Coroutine[Any, Any, dict[str, Any]]]] = {
    "confinement": confinement,
    "demo": demo,
    "mistake": mistake,
    "mutual-tls": mutual_tls,
    "whole-demo": whole_demo,
}


def _use_fake_engine(deployment: Manifest) -> None:
    spec = deployment["spec"]["template"]["spec"]
    del spec["initContainers"]
    spec["containers"][0]["args"] += ["engine=fake", "standalone=true"]


def _take_small_steps(manifests: list[Manifest]) -> None:
    data = config_data(manifests, "run.yaml")
    for old, new in _SMALL_STEPS.items():
        assert old in data["run.yaml"]
        data["run.yaml"] = data["run.yaml"].replace(old, new)


def _num_ready(cluster: Cluster) -> int:
    return sum(pod.ready for pod in cluster.replicas(_ACTOR))


async def _look_around(
    cluster: Cluster, name: str, template: Manifest, labels: dict[str, str], targets: list[Any], names: list[str]
) -> Any:
    """What a pod with these labels finds; see tests/manifests/look_around.py."""
    command = ["python", "-m", "tests.manifests.look_around", json.dumps(targets), json.dumps(names)]
    code, text = await _run_once(cluster, name, template, labels, command)
    assert code == 0, text
    return json.loads(text)


async def _run_client(cluster: Cluster, name: str, template: Manifest, command: list[str]) -> tuple[int, str]:
    """Exit code and output of a command in a pod that may call actors, and has the reader's certificate."""
    template = copy.deepcopy(template)
    for volume in template["spec"]["volumes"]:
        if "secret" in volume:
            volume["secret"]["secretName"] = "outrider-reader-tls"
    return await _run_once(cluster, name, template, {"outrider.dev/client": "true"}, command)


async def _run_once(
    cluster: Cluster, name: str, template: Manifest, labels: dict[str, str], command: list[str]
) -> tuple[int, str]:
    """Run a command in a pod like an actor's, with these labels; its exit code and what it printed."""
    template = copy.deepcopy(template)
    template["metadata"]["labels"] = labels
    template["spec"]["restartPolicy"] = "Never"
    template["spec"].pop("initContainers", None)
    [container] = template["spec"]["containers"]
    for key in ("startupProbe", "livenessProbe", "readinessProbe", "lifecycle", "args"):
        container.pop(key, None)
    container["command"] = command
    pod = cluster.run_pod(name, template)
    await cluster.until(lambda: pod not in cluster.pods, 60, f"{name} has ended")
    return pod.endings[-1].code, pod.log("actor")


async def _further_steps(cluster: Cluster, folder: Path) -> int:
    """Wait for some more steps; how many the run has done then."""
    wanted = _steps(folder) + 3
    await cluster.until(lambda: _steps(folder) >= wanted, _LOAD_S, f"{wanted} steps are done")
    return _steps(folder)


def _resumed_at(cluster: Cluster, before: Pod) -> int | None:
    """The step at which a learner that is not `before` says that it goes on."""
    found = [
        re.search(r"resuming \S+ at step (\d+)", pod.log("learner"))
        for pod in cluster.pods
        if pod.name == _LEARNER and pod is not before
    ]
    return int(found[0][1]) if found and found[0] else None


def _steps(folder: Path) -> int:
    """Steps that the run has done."""
    return max((line["step"] for line in _lines(folder)), default=0)


def _lines(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each step; the later line counts where a resumed run did a step again."""
    paths = list((folder / "claims" / "outrider-runs").glob("digits-*/metrics.jsonl"))
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.endswith("}")]
    return list({line["step"]: line for line in lines if "sequences" in line}.values())


def main() -> None:
    """Play one scenario here."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    try:
        network = enter_node()
    except OSError as error:
        print(f"network and mount namespaces are not permitted here ({error}); run as root", file=sys.stderr)
        sys.exit(_NOT_PERMITTED)
    seen: dict[str, Any] = asyncio.run(SCENARIOS[name](folder, network))
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
