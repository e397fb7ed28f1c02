"""Rules for rendered manifests. Each takes all of them and returns what is wrong, in words; [] if nothing is."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from actor.config import ActorConfig
from common.config import ConfigError, parse_config
from common.rpc.server import split_address
from common.rpc.tls import ACTOR, LEARNER
from learner.config import LearnerConfig
from tests.manifests.rendered import Manifest, containers, pod_templates

# Seconds that an actor needs between the end of its drain and its exit: the port, the engine and its processes.
_EXIT_S = 5


def matches(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector of Kubernetes selects an object with these labels."""
    for expression in selector.get("matchExpressions", ()):
        key, operator, values = expression["key"], expression["operator"], expression.get("values", ())
        holds = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }[operator]
        if not holds:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def selectors_meet(manifests: list[Manifest]) -> list[str]:
    """Each Service, budget, monitor and controller selects exactly one kind of pod."""
    pods = {name: template["metadata"]["labels"] for name, template in pod_templates(manifests).items()}
    problems = []
    for manifest in manifests:
        kind, name, spec = manifest["kind"], manifest["metadata"]["name"], manifest.get("spec", {})
        if kind == "Service":
            selector = {"matchLabels": spec["selector"]}
        elif kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
            selector = spec["selector"]
        else:
            continue
        found = [pod for pod, labels in pods.items() if matches(selector, labels)]
        if len(found) != 1:
            problems.append(f"{kind} {name} selects the pods of {found or 'nothing'}")
        elif kind == "Deployment" and found != [name]:
            problems.append(f"Deployment {name} selects the pods of {found[0]}")
    for manifest in manifests:
        scaled = manifest.get("spec", {}).get("scaleTargetRef", {}).get("name")
        if scaled is not None and scaled not in pods:
            problems.append(f"{manifest['kind']} {manifest['metadata']['name']} scales {scaled}, which is not there")
    return problems


def ports_meet(manifests: list[Manifest]) -> list[str]:
    """Ports of Services and monitors exist in the pods that they select; those of probes are declared."""
    templates = pod_templates(manifests)
    problems = []
    for manifest in manifests:
        name, spec = manifest["metadata"]["name"], manifest.get("spec", {})
        if manifest["kind"] == "Service":
            selector, wanted = {"matchLabels": spec["selector"]}, [port["targetPort"] for port in spec["ports"]]
        elif manifest["kind"] == "PodMonitor":
            selector, wanted = spec["selector"], [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]]
        else:
            continue
        for template in templates.values():
            if matches(selector, template["metadata"]["labels"]):
                known = {port["name"] for container in containers(template) for port in container.get("ports", ())}
                problems += [f"{name}: no port {port} in its pods" for port in wanted if port not in known]
    for pod, template in templates.items():
        for container in containers(template):
            declared = {port["containerPort"] for port in container.get("ports", ())}
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                port = container.get(kind, {}).get("grpc", {}).get("port")
                if port is not None and port not in declared:
                    problems.append(f"{pod}: {kind} asks port {port}, which is not declared")
    return problems


def actor_config(manifests: list[Manifest]) -> ActorConfig:
    """What the actors of these manifests run with, read as an actor reads it. Raises ConfigError."""
    return parse_config(ActorConfig, _values(manifests, "outrider-actor"), "actor.yaml")


def learner_config(manifests: list[Manifest]) -> LearnerConfig:
    """What the learner runs with. Raises ConfigError."""
    return parse_config(LearnerConfig, _values(manifests, "outrider-learner"), "run.yaml")


def _values(manifests: list[Manifest], pod: str) -> dict[str, Any]:
    """The YAML file that the pod's command names, with the overrides beside it."""
    [container] = containers(pod_templates(manifests)[pod], init=False)
    arguments = container["args"]
    path = arguments[arguments.index("--config") + 1]
    values: dict[str, Any] = yaml.safe_load(config_files(manifests, pod)[path])
    for override in arguments[arguments.index(path) + 1 :]:
        key, _, text = override.partition("=")
        *parents, leaf = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = yaml.safe_load(text)
    return values


def config_files(manifests: list[Manifest], pod: str) -> dict[str, str]:
    """Texts of the files that ConfigMaps bring into this pod, by their paths there."""
    template = pod_templates(manifests)[pod]
    maps = {manifest["metadata"]["name"]: manifest["data"] for manifest in manifests if manifest["kind"] == "ConfigMap"}
    named = {
        volume["name"]: volume["configMap"]["name"] for volume in template["spec"]["volumes"] if "configMap" in volume
    }
    [container] = containers(template, init=False)
    return {
        f"{mount['mountPath']}/{file}": text
        for mount in container["volumeMounts"]
        if mount["name"] in named
        for file, text in maps[named[mount["name"]]].items()
    }


def config_is_read(manifests: list[Manifest]) -> list[str]:
    """Both files parse with the classes that the programs use, and agree with the pods around them."""
    try:
        actor, learner = actor_config(manifests), learner_config(manifests)
    except (ConfigError, KeyError) as error:
        return [str(error)]
    problems = []
    [container] = containers(pod_templates(manifests)["outrider-actor"], init=False)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    host, port = split_address(actor.listen)
    if (host, port) != ("0.0.0.0", ports["grpc"]):
        problems.append(f"the actor listens on {actor.listen}, its container declares port {ports['grpc']}")
    if not actor.insecure and actor.tls is None:
        problems.append("the actor would refuse to listen in plaintext")
    probed = port if actor.health_listen is None else split_address(actor.health_listen)[1]
    if actor.tls is not None and (actor.health_listen is None or probed != ports["health"]):
        problems.append("probes have no certificate: the actor needs a health_listen on a port that is declared")
    if actor.metrics_listen != f"0.0.0.0:{ports['metrics']}":
        problems.append(f"metrics are at {actor.metrics_listen}, its container declares port {ports['metrics']}")
    [trainer] = containers(pod_templates(manifests)["outrider-learner"], init=False)
    declared = {port["name"]: port["containerPort"] for port in trainer["ports"]}
    if learner.metrics_listen != f"0.0.0.0:{declared['metrics']}":
        problems.append(f"the learner's metrics are at {learner.metrics_listen}, not at {declared['metrics']}")
    if actor.model != learner.model.path:
        problems.append(f"the actor loads {actor.model}, the learner {learner.model.path}")
    problems += [
        f"{probe} asks port {container[probe]['grpc']['port']}, the actor listens on {probed}"
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        if container[probe]["grpc"]["port"] != probed
    ]
    gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    if gpus and gpus != actor.vllm.tensor_parallel_size:
        problems.append(f"the actor has {gpus} GPUs, vllm.tensor_parallel_size is {actor.vllm.tensor_parallel_size}")
    services = {
        manifest["metadata"]["name"]: manifest["spec"] for manifest in manifests if manifest["kind"] == "Service"
    }
    for target in learner.rollout.actors:
        name, asked = split_address(target.removeprefix("dns:///"))
        service = services.get(name, {})
        if service.get("clusterIP") != "None" or not service.get("publishNotReadyAddresses"):
            problems.append(f"{name} is not a headless Service with addresses that are not ready")
        if [entry["port"] for entry in service.get("ports", ())] != [asked]:
            problems.append(f"the learner asks {target}, the Service has other ports")
    return problems


def certificates_meet(manifests: list[Manifest]) -> list[str]:
    """Actor and learner both have certificates or none, each with the name of its role, of one authority."""
    actor, learner = actor_config(manifests), learner_config(manifests)
    if (actor.tls is None) != (learner.rollout.tls is None):
        return ["only one of actor and learner has certificates"]
    issued = {m["spec"]["secretName"]: m["spec"] for m in manifests if m["kind"] == "Certificate"}
    problems = []
    for pod, name, directory in (
        ("outrider-actor", ACTOR, actor.tls),
        ("outrider-learner", LEARNER, learner.rollout.tls),
    ):
        if directory is None:
            continue
        spec = pod_templates(manifests)[pod]["spec"]
        [container] = containers(pod_templates(manifests)[pod], init=False)
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        secrets = {volume["name"]: volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume}
        certificate = issued.get(secrets.get(mounts.get(str(directory), ""), ""), {})
        if certificate.get("dnsNames") != [name]:
            problems.append(f"{pod} finds no certificate for {name} in {directory}")
        elif certificate["issuerRef"] != issued["outrider-reader-tls"]["issuerRef"]:
            problems.append(f"{pod} has a certificate of another authority")
    return problems


def grace_suffices(manifests: list[Manifest]) -> list[str]:
    """Grace > preStop + drain + exit; the startup probe is the only one that waits for a model."""
    template = pod_templates(manifests)["outrider-actor"]
    [container] = containers(template, init=False)
    grace_s = template["spec"]["terminationGracePeriodSeconds"]
    pre_stop_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed_s = pre_stop_s + actor_config(manifests).grace_s + _EXIT_S
    if grace_s <= needed_s:
        return [f"grace {grace_s} s is not more than preStop, drain and exit, {needed_s:g} s"]
    return []


def probes_are_right(manifests: list[Manifest]) -> list[str]:
    """Actors: startup and liveness ask "liveness", which knows no learner; readiness asks "readiness"."""
    [container] = containers(pod_templates(manifests)["outrider-actor"], init=False)
    wanted = {"startupProbe": "liveness", "livenessProbe": "liveness", "readinessProbe": "readiness"}
    problems = [
        f"{kind} asks {container[kind]['grpc'].get('service')!r}"
        for kind, service in wanted.items()
        if container[kind]["grpc"].get("service") != service
    ]
    startup = container["startupProbe"]
    if startup["periodSeconds"] * startup["failureThreshold"] < 600:
        problems.append("the startup probe gives a model less than ten minutes")
    return problems


def pods_are_confined(manifests: list[Manifest]) -> list[str]:
    """The restricted pod security standard, and what goes beyond it."""
    problems = []
    for pod, template in pod_templates(manifests).items():
        spec = template["spec"]
        context = spec.get("securityContext", {})
        rules = {
            "runs as root": context.get("runAsNonRoot") is True and context.get("runAsUser", 0) > 0,
            "has no seccomp profile": context.get("seccompProfile") == {"type": "RuntimeDefault"},
            "gets a token": spec.get("automountServiceAccountToken") is False,
            "gets variables for Services": spec.get("enableServiceLinks") is False,
            "shares its node": not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")),
            "mounts its node": all("hostPath" not in volume for volume in spec.get("volumes", ())),
        }
        problems += [f"{pod} {problem}" for problem, holds in rules.items() if not holds]
        for container in containers(template):
            own, resources = container.get("securityContext", {}), container.get("resources", {})
            rules = {
                "may gain privileges": own.get("allowPrivilegeEscalation") is False,
                "has a writable root": own.get("readOnlyRootFilesystem") is True,
                "has capabilities": own.get("capabilities") == {"drop": ["ALL"]},
                "requests nothing": {"cpu", "memory"} <= set(resources.get("requests", ())),
                "has no limits": {"cpu", "memory"} <= set(resources.get("limits", ())),
                "does not cache in a volume": _home(container) in _writable(container),
                "has no writable /tmp": "/tmp" in _writable(container),
            }
            problems += [f"{pod}/{container['name']} {problem}" for problem, holds in rules.items() if not holds]
    return problems


def _home(container: Manifest) -> str:
    return next((entry["value"] for entry in container.get("env", ()) if entry["name"] == "HOME"), "")


def _writable(container: Manifest) -> set[str]:
    return {mount["mountPath"] for mount in container.get("volumeMounts", ()) if not mount.get("readOnly")}


def references_exist(manifests: list[Manifest]) -> list[str]:
    """Accounts, claims, ConfigMaps, volumes and subdomains that pods name are there."""
    known = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    sets = {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "JobSet"}
    problems = []
    for pod, template in pod_templates(manifests).items():
        spec = template["spec"]
        for kind, name in _references(spec):
            if (kind, name) not in known and not (kind == "Service" and name in sets):
                problems.append(f"{pod} names {kind} {name}, which is not there")
        volumes = {volume["name"] for volume in spec["volumes"]}
        mounted = {mount["name"] for container in containers(template) for mount in container["volumeMounts"]}
        problems += [f"{pod} mounts {name}, which is no volume" for name in sorted(mounted - volumes)]
        problems += [f"{pod} has a volume {name} that nothing mounts" for name in sorted(volumes - mounted)]
    return problems


def _references(spec: Manifest) -> Iterator[tuple[str, str]]:
    yield "ServiceAccount", spec["serviceAccountName"]
    if "subdomain" in spec:
        yield "Service", spec["subdomain"]
    for volume in spec["volumes"]:
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]


def ranks_are_one_job(manifests: list[Manifest]) -> list[str]:
    """As many pods as torchrun waits for, GPUs as ranks, and a rendezvous under a name that exists."""
    jobs = [manifest["spec"] for manifest in manifests if manifest["kind"] == "Job"]
    jobs += [
        entry["template"]["spec"]
        for manifest in manifests
        if manifest["kind"] == "JobSet"
        for entry in manifest["spec"]["replicatedJobs"]
    ]
    [job] = jobs
    [container] = containers(job["template"], init=False)
    env = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    [budget] = [
        manifest["spec"]["minAvailable"]
        for manifest in manifests
        if manifest["kind"] == "PodDisruptionBudget" and manifest["metadata"]["name"] == "outrider-learner"
    ]
    pods = job["completions"]
    first_pod = (
        "outrider-learner-node-0-0" if any(entry["kind"] == "JobSet" for entry in manifests) else "outrider-learner-0"
    )
    claims = {
        entry["metadata"]["name"]: entry["spec"] for entry in manifests if entry["kind"] == "PersistentVolumeClaim"
    }
    rules = {
        "parallelism is not completions": job["parallelism"] == pods,
        "pods have no index": job["completionMode"] == "Indexed",
        f"PET_NNODES is not {pods}": env["PET_NNODES"] == str(pods),
        f"PET_NPROC_PER_NODE is not the {gpus} GPUs": gpus is None or env["PET_NPROC_PER_NODE"] == gpus,
        "the budget lets a pod go": budget == pods,
        "ranks meet at no pod": env["PET_MASTER_ADDR"] == f"{first_pod}.{job['template']['spec'].get('subdomain')}",
        "several pods share a claim of one": pods == 1 or claims["outrider-runs"]["accessModes"] == ["ReadWriteMany"],
    }
    return [problem for problem, holds in rules.items() if not holds]


def nothing_leaves(manifests: list[Manifest]) -> list[str]:
    """Everything is denied by default, and no rule names an address: no internet, no metadata service."""
    policies = [manifest["spec"] for manifest in manifests if manifest["kind"] == "NetworkPolicy"]
    deny = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    problems = [] if deny in policies else ["there is no policy that denies everything"]
    for policy in policies:
        for rule in [*policy.get("ingress", ()), *policy.get("egress", ())]:
            peers = [*rule.get("from", ()), *rule.get("to", ())]
            if not peers or any("ipBlock" in peer or peer in ({}, {"podSelector": {}}) for peer in peers):
                problems.append(f"a rule is open to all: {rule}")
            if not rule.get("ports"):
                problems.append(f"a rule is open at all ports: {rule}")
    return problems


def names_are_plain(manifests: list[Manifest]) -> list[str]:
    """No Service would make variables that vLLM reads; everything is in one namespace and carries the label."""
    problems = []
    cluster_wide = {"Namespace"}  # of anything else, the end of one run would take away another's
    for manifest in manifests:
        kind, metadata = manifest["kind"], manifest["metadata"]
        if kind == "Service" and re.match("(?i)vllm", metadata["name"]):
            problems.append(f"Service {metadata['name']}: its variables would be read by vLLM")
        if kind not in cluster_wide and metadata.get("namespace") != "outrider":
            problems.append(f"{kind} {metadata['name']} is in no namespace of ours")
        if (
            kind not in cluster_wide | {"ConfigMap"}
            and metadata.get("labels", {}).get("app.kubernetes.io/part-of") != "outrider"
        ):
            problems.append(f"{kind} {metadata['name']} does not say whose it is")
    return problems


RULES = (
    selectors_meet,
    ports_meet,
    config_is_read,
    certificates_meet,
    grace_suffices,
    probes_are_right,
    pods_are_confined,
    references_exist,
    ranks_are_one_job,
    nothing_leaves,
    names_are_plain,
)
