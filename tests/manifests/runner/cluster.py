"""A runner of manifests, not a Kubernetes: Deployments, Jobs, Services and NetworkPolicies of one node, in processes.

What it does not have: a scheduler, resource limits, seccomp, images (the checkout and this Python environment stand for
them), virtual addresses of Services (their names answer with the addresses of ready pods).
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from tests.manifests.policies import matches
from tests.manifests.rendered import Manifest
from tests.manifests.runner import kernel
from tests.manifests.runner.certificates import CertManager
from tests.manifests.runner.names import DOMAIN, NameServer
from tests.manifests.runner.network import Network
from tests.manifests.runner.packet_filter import Peer, decide
from tests.manifests.runner.pod import Pod
from tests.manifests.runner.volumes import Storage

_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
_KUBE_DNS = {"k8s-app": "kube-dns"}


def enter_node() -> Network:
    """Make this process the node: namespaces of its own, and the pods' network. Before any thread starts.

    Raises OSError where that is not permitted.
    """
    kernel.unshare(kernel.CLONE_NEWNET | kernel.CLONE_NEWNS)
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    network = Network()
    network.set_up()
    return network


class Cluster:
    """Runs what `manifests` describe. Logs and volumes are in `folder`."""

    def __init__(self, manifests: list[Manifest], folder: Path, network: Network) -> None:
        self.manifests = manifests
        self.pods: list[Pod] = []
        # Those that have ended, too.
        self.all_pods: list[Pod] = []
        self._network = network
        self._storage = Storage(folder, {}, {}, {})
        self._cert_manager = CertManager()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._filtering = asyncio.Lock()
        self._num_applied = 0

    # ---------------------------------------------------------------------------------------------- commands

    async def apply(self) -> None:
        """`kubectl apply`: everything at once."""
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: NameServer(self.names), (self._network.name_server, 53))
        for manifest in self.manifests:
            name = manifest["metadata"]["name"]
            if manifest["kind"] == "ConfigMap":
                self._storage.config_maps[name] = manifest["data"]
            elif manifest["kind"] == "PersistentVolumeClaim":
                self._storage.claims[name] = self._claim(name)
        self.renew_certificates()
        for manifest in self._of("Deployment"):
            for _ in range(manifest["spec"]["replicas"]):
                self._add_replica(manifest)
        for manifest in self._of("Job"):
            await self.apply_job(manifest["metadata"]["name"])

    async def apply_job(self, name: str) -> None:
        """`kubectl apply`, of a Job alone: a pod for each index."""
        self._num_applied += 1
        [manifest] = [manifest for manifest in self._of("Job") if manifest["metadata"]["name"] == name]
        for index in range(manifest["spec"]["completions"]):
            self._spawn(self._complete(manifest, index))

    async def delete_job(self, name: str) -> None:
        """`kubectl delete job NAME`: its pods end in order."""
        pods = [pod for pod in self.pods if pod.labels.get("app.kubernetes.io/name") == name]
        await asyncio.gather(*(pod.terminate() for pod in pods))
        await asyncio.gather(*(pod.ended.wait() for pod in pods))

    async def scale(self, name: str, replicas: int) -> None:
        """`kubectl scale deployment/NAME --replicas=N`. Returns at once; pods that are not ready leave first."""
        [manifest] = [manifest for manifest in self._of("Deployment") if manifest["metadata"]["name"] == name]
        manifest["spec"]["replicas"] = replicas
        pods = self.replicas(name)
        for _ in range(replicas - len(pods)):
            self._add_replica(manifest)
        age = {pod.name: index for index, pod in enumerate(pods)}
        newest_first = sorted(pods, key=lambda pod: (pod.ready, -age[pod.name]))
        for pod in newest_first[: max(0, len(pods) - replicas)]:
            self._spawn(pod.terminate())
            pod.terminating = True

    async def roll(self, name: str, annotations: dict[str, str], timeout_s: float) -> None:
        """`kubectl rollout restart`: new pods in place of the old ones, as many at once as the strategy says."""
        [manifest] = [manifest for manifest in self._of("Deployment") if manifest["metadata"]["name"] == name]
        strategy = manifest["spec"]["strategy"]["rollingUpdate"]
        if (strategy["maxUnavailable"], strategy["maxSurge"]) != (1, 0):
            raise NotImplementedError(f"rolling update {strategy}")
        manifest["spec"]["template"]["metadata"].setdefault("annotations", {}).update(annotations)
        for old in self.replicas(name):
            self._spawn(old.terminate())
            old.terminating = True
            new = self._add_replica(manifest)
            await self.until(lambda new=new: new.ready, timeout_s, f"{new.name} is ready")

    def renew_certificates(self) -> None:
        """`kubectl delete secret` of all certificates: cert-manager makes new ones, and running pods get the files."""
        for manifest in self._of("Certificate"):
            if not manifest["spec"].get("isCA"):
                self._storage.secrets[manifest["spec"]["secretName"]] = self._cert_manager.issue(manifest)
        for pod in self.pods:
            pod.refresh_secrets()

    def run_pod(self, name: str, template: Manifest) -> Pod:
        """`kubectl run`: a pod of its own."""
        return self._launch(name, template, dict(template["metadata"]["labels"]), {})

    def replicas(self, name: str) -> list[Pod]:
        """Pods of a Deployment that are to stay, oldest first."""
        return [pod for pod in self.pods if pod.name.startswith(f"{name}-") and not pod.terminating]

    async def until(self, condition: Callable[[], Any], timeout_s: float, what: str) -> None:
        """Wait for a condition on this cluster. Raises TimeoutError with `what`, AssertionError if a pod has failed."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout_s:g} s: {what}")
            for task in [task for task in self._tasks if task.done()]:
                self._tasks.discard(task)
                task.result()
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        """`kubectl delete`: everything ends as it does in a cluster, all at once."""
        await asyncio.gather(*(pod.terminate() for pod in self.pods if not pod.terminating))
        await self.until(lambda: not self.pods, 120, "all pods have ended")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------------- controllers

    def _add_replica(self, manifest: Manifest) -> Pod:
        template = json.loads(json.dumps(manifest["spec"]["template"]))
        revision = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{manifest['metadata']['name']}-{revision}-{secrets.token_hex(2)}"
        return self._launch(name, template, {**template["metadata"]["labels"], "pod-template-hash": revision}, {})

    async def _complete(self, job: Manifest, index: int) -> None:
        """One index of an Indexed Job: a pod, and another one while it fails and may be tried again."""
        spec, name = job["spec"], f"{job['metadata']['name']}-{index}"
        for attempt in range(spec["backoffLimit"] + 1):
            labels = {**spec["template"]["metadata"]["labels"], _INDEX_LABEL: str(index)}
            folder = f"job-{self._num_applied}-{attempt}"
            pod = self._launch(name, spec["template"], labels, {"JOB_COMPLETION_INDEX": str(index)}, folder)
            await pod.ended.wait()
            if pod.phase == "Succeeded" or pod.terminating or _fails_job(spec["podFailurePolicy"], pod):
                return
        raise AssertionError(f"{name} has failed {spec['backoffLimit'] + 1} times")

    def _launch(
        self, name: str, template: Manifest, labels: dict[str, str], env: dict[str, str], folder: str = "pods"
    ) -> Pod:
        storage = dataclasses.replace(self._storage, folder=self._storage.folder / folder)
        pod = Pod(name, "outrider", template, labels, env, storage, self._network, self._changed.set)
        self.pods.append(pod)
        self.all_pods.append(pod)
        self._spawn(self._run(pod))
        return pod

    async def _run(self, pod: Pod) -> None:
        try:
            await pod.start_sandbox()
            await self._filter_all()
            await pod.run()
        finally:
            self.pods.remove(pod)
        await self._filter_all()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(coroutine))

    # ----------------------------------------------------------------------------------------- names, policies

    def names(self) -> dict[str, list[str]]:
        """What DNS knows now."""
        found: dict[str, list[str]] = {}
        for service in self._of("Service"):
            spec, name = service["spec"], service["metadata"]["name"]
            with_unready = bool(spec.get("publishNotReadyAddresses"))
            pods = [
                pod
                for pod in self.pods
                if pod.address
                and matches({"matchLabels": spec["selector"]}, pod.labels)
                and (with_unready or (pod.ready and not pod.terminating))
            ]
            domain = f"{name}.{service['metadata']['namespace']}.{DOMAIN}"
            found[domain] = [pod.address for pod in pods]
            found |= {f"{pod.name}.{domain}": [pod.address] for pod in pods if pod.spec.get("subdomain") == name}
        return found

    async def _filter_all(self) -> None:
        async with self._filtering:
            pods = [pod for pod in self.pods if pod.address]
            peers = [pod.peer for pod in pods]
            peers.append(Peer(self._network.name_server, _KUBE_DNS, "kube-system"))
            policies = self._of("NetworkPolicy")
            for pod in pods:
                with contextlib.suppress(ConnectionError):
                    await pod.filter(decide(policies, pod.peer, [peer for peer in peers if peer != pod.peer]))

    def _of(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def _claim(self, name: str) -> Path:
        path = self._storage.folder / "claims" / name
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o2777)
        return path


def _fails_job(policy: Manifest, pod: Pod) -> bool:
    """Whether the end of this pod is that of its Job."""
    rules = [rule["onExitCodes"] for rule in policy["rules"] if rule["action"] == "FailJob"]
    assert all(rule["operator"] == "In" for rule in rules)
    return any(
        ending.container == rule["containerName"] and ending.code in rule["values"]
        for rule in rules
        for ending in pod.endings
    )
