"""What pods start, and what they give to it, exists in the code."""

import json
import re
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from actor.config import ActorConfig
from actor.metrics import ActorMetrics
from learner.config import LearnerConfig
from learner.reporting.metrics import LearnerMetrics
from tests.manifests import policies
from tests.manifests.rendered import (
    K8S,
    ROOT,
    VARIANTS,
    Manifest,
    config_data,
    containers,
    find,
    kustomize,
    pod_templates,
    read,
    render,
    render_own,
    render_text,
)

# Who reads a variable: a module that says its name.
READERS = {
    "HOME": "posixpath",
    "HF_DATASETS_CACHE": "datasets.config",
    "HF_HUB_OFFLINE": "huggingface_hub.constants",
    "OMP_NUM_THREADS": "torch.distributed.run",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "opentelemetry.sdk.environment_variables",
    "OTEL_TRACES_SAMPLER": "opentelemetry.sdk.environment_variables",
    "OTEL_TRACES_SAMPLER_ARG": "opentelemetry.sdk.environment_variables",
    "VLLM_NO_USAGE_STATS": "vllm.envs",
}


def _source(module: str) -> str:
    """The source of a module, without importing it."""
    path: list[str] | None = None
    origin: str | None = None
    for name in module.split("."):
        spec = PathFinder.find_spec(name, path)
        assert spec is not None, module
        path, origin = spec.submodule_search_locations, spec.origin
    assert origin is not None
    return Path(origin).read_text()


def _all_containers() -> list[Manifest]:
    return [
        container
        for variant in VARIANTS
        for template in pod_templates(render(*variant)).values()
        for container in containers(template)
    ]


def test_every_command_is_a_console_script_or_a_module() -> None:
    scripts = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
    seen = set()
    for container in _all_containers():
        program: str = container["command"][0]
        arguments: list[str] = [*container["command"][1:], *container.get("args", ())]
        if program == "python":
            assert arguments[0] == "-m"
            assert (ROOT / arguments[1].replace(".", "/")).with_suffix(".py").is_file(), arguments[1]
        else:
            assert program in scripts, program
        if arguments[:2] == ["-m", "learner.torchrun"]:
            assert arguments[2:4] == ["--module", "learner"]
        seen.add(" ".join(container["command"]))
    assert {"python -m learner.torchrun", "outrider-actor"} <= seen


def test_every_variable_is_read_by_somebody() -> None:
    from torch.distributed.run import get_args_parser

    options = {f"PET_{action.dest.upper()}" for action in get_args_parser()._actions}
    names = {entry["name"] for container in _all_containers() for entry in container.get("env", ())}
    assert {name for name in names if name.startswith("PET_")} <= options
    others = {name for name in names if not name.startswith("PET_")}
    assert others == set(READERS)
    for name, module in READERS.items():
        assert re.search(rf"""['"]{name}['"]""", _source(module)), f"{module} does not read {name}"


def test_the_demo_runs_the_file_that_runs_locally() -> None:
    local = ROOT / "examples" / "digits" / "config.yaml"
    assert (K8S / "overlays" / "cpu-demo" / "run.yaml").read_bytes() == local.read_bytes()
    assert config_data(render("cpu-demo"), "run.yaml")["run.yaml"] == local.read_text()


def test_actors_of_the_demo_are_configured_as_local_ones() -> None:
    manifests = render("cpu-demo")
    actor = policies.actor_config(manifests)
    assert actor.vllm == ActorConfig(**policies.learner_config(manifests).local.actor).vllm


def test_the_learner_is_told_only_where_it_runs() -> None:
    """Overrides on its command line name places; what the run computes is in the file."""
    places = {
        "rollout.actors",
        "rollout.tls",
        "runs_dir",
        "model.path",
        "trainer.fsdp_size",
        "weights.backend",
        "metrics_listen",
        "tracing",
    }
    for variant in VARIANTS:
        [container] = containers(pod_templates(render(*variant))["outrider-learner"], init=False)
        overrides = [argument for argument in container["args"] if re.match(r"[a-z_.]+=", argument)]
        assert {override.partition("=")[0] for override in overrides} <= places


def test_overrides_on_the_command_line_count() -> None:
    manifests = render("gpu-multinode")
    learner = policies.learner_config(manifests)
    assert isinstance(learner, LearnerConfig)
    assert (learner.trainer.fsdp_size, learner.runs_dir) == (8, Path("/runs"))
    assert policies.actor_config(render("gpu", "spot-actors")).grace_s == 15


@pytest.mark.parametrize("variant", [("gpu-multinode",), ("gpu-multinode", "jobset")])
def test_a_learner_pod_waits_for_the_node_of_the_other_one(variant: tuple[str, ...]) -> None:
    """torchrun's own ten minutes, ten times, would end the Job before a node is free."""
    from torch.distributed.run import config_from_args, get_args_parser

    [container] = containers(pod_templates(render(*variant))["outrider-learner"], init=False)
    variables = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    conf = variables["PET_RDZV_CONF"]
    command = ["--nnodes", variables["PET_NNODES"], "--rdzv-conf", conf, "script.py"]
    config, _, _ = config_from_args(get_args_parser().parse_args(command))
    assert int(config.rdzv_configs["timeout"]) >= 12 * 3600


def test_a_learner_pod_that_waits_for_the_other_ones_ends_when_it_is_deleted() -> None:
    """Process 1 ignores signals that it does not handle, and torchrun handles none until it starts its ranks."""
    shared = {
        pod_templates(render(*variant))["outrider-learner"]["spec"].get("shareProcessNamespace") for variant in VARIANTS
    }
    assert shared == {True}


def test_the_wire_of_weights_is_left_to_the_learner() -> None:
    """It takes no NCCL to the GPUs of tensor-parallel actors (tests/unit/learner/weights/test_publisher.py)."""
    backends = {}
    for overlay in ("gpu", "gpu-multinode"):
        manifests = render(overlay)
        learner = policies.learner_config(manifests)
        assert isinstance(learner, LearnerConfig)
        backends[policies.actor_config(manifests).vllm.tensor_parallel_size] = learner.weights.backend
    assert backends == {1: None, 4: None}


@pytest.fixture(scope="module")
def metric_names() -> set[str]:
    """Names that the endpoints of actor and learner show."""
    from actor.config import FakeConfig
    from actor.engine_fake.engine import FakeEngine
    from actor.weights.policy_state import PolicyState

    engine = FakeEngine(FakeConfig(), "actor")
    no_groups: Any = SimpleNamespace(running=0, dropped={}, retries={})
    families = [
        *ActorMetrics(PolicyState(engine), engine).registry.collect(),
        *LearnerMetrics(members=tuple, stats=lambda: no_groups, num_buffered=int).registry.collect(),
    ]
    return {
        name
        for family in families
        for name in {
            "gauge": [family.name],
            "counter": [f"{family.name}_total"],
            "histogram": [f"{family.name}_bucket", f"{family.name}_sum", f"{family.name}_count"],
        }[family.type]
    }


def test_dashboard_alerts_and_autoscalers_ask_for_metrics_that_exist(metric_names: set[str]) -> None:
    dashboard = json.loads((K8S / "components" / "monitoring" / "dashboard" / "outrider.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    asked = {name for target in targets for name in re.findall(r"outrider_\w+", target)}
    actors_own = {name for name in metric_names if re.match(r"outrider_actor_(?!.+_(sum|count)$)", name)}
    assert {name for name in asked if name.startswith("outrider_actor_")} == actors_own
    learners = {"reward", "accuracy", "loss", "mismatch_kl", "parity_max_abs_diff", "update_failures_total", "actors"}
    assert {f"outrider_learner_{key}" for key in learners} <= asked
    assert asked <= metric_names
    assert [expression for expression in targets if '{namespace="$namespace"}' not in expression] == []
    [group] = find(render("gpu", "monitoring"), "PrometheusRule")["spec"]["groups"]
    assert len(group["rules"]) == 5
    for alert in group["rules"]:
        names = set(re.findall(r"outrider_\w+", alert["expr"]))
        assert names, alert["alert"]
        assert names <= metric_names
        grouped = re.findall(r"by \(namespace\) \([a-z]*\(?outrider_", alert["expr"])
        assert len(grouped) == alert["expr"].count("outrider_"), f"{alert['alert']} forgets a learner that is replaced"
    [metric] = find(render("gpu", "hpa"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    rule = (K8S / "components" / "hpa" / "kustomization.yaml").read_text()
    assert f"name: {{as: {metric['external']['metric']['name']}}}" in rule
    [asked_by_adapter] = set(re.findall(r"outrider_learner_\w+_total", rule))
    assert asked_by_adapter in metric_names
    [trigger] = find(render("gpu", "keda"), "ScaledObject")["spec"]["triggers"]
    assert set(re.findall(r"outrider_\w+", trigger["metadata"]["query"])) <= metric_names


def test_the_dashboard_is_of_no_run() -> None:
    """Grafana's sidecar keeps dashboards by file name: the end of one run would take that of all others away."""
    [manifest] = yaml.safe_load_all(kustomize(K8S / "components" / "monitoring" / "dashboard"))
    assert (manifest["kind"], manifest["metadata"]["namespace"]) == ("ConfigMap", "monitoring")
    assert manifest["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(manifest["data"]["outrider.json"])["title"] == "Outrider"
    assert "grafana_dashboard" not in render_text("gpu", "monitoring")


def test_autoscaled_actors_have_no_number_in_the_manifest() -> None:
    assert "replicas" not in find(render("gpu", "hpa"), "Deployment")["spec"]
    assert "replicas" not in find(render("gpu", "keda"), "Deployment")["spec"]
    assert find(render("gpu"), "Deployment")["spec"]["replicas"] == 4


@pytest.mark.parametrize(
    ("variant", "learner"), [(("gpu",), "Job"), (("gpu-multinode",), "Job"), (("gpu-multinode", "jobset"), "JobSet")]
)
@pytest.mark.parametrize(
    ("name", "file", "text", "changes"),
    [
        ("outrider-actor", "actor.yaml", "model: /models/other", "actor"),
        ("outrider-run", "run.yaml", "name: other", "learner"),
        ("outrider-run", "my_rewards.py", "def reward(**_): ...", "learner"),
    ],
)
def test_a_changed_file_changes_the_side_that_reads_it_alone(
    variant: tuple[str, ...], learner: str, name: str, file: str, text: str, changes: str
) -> None:
    """The actors are rolled for a changed actor.yaml, and a Job, which cannot be changed, stays as it is."""
    before = render(*variant)
    after = render_own(*variant, config={name: {file: text}})
    same = {kind: find(before, kind) == find(after, kind) for kind in ("Deployment", learner)}
    assert same == {"Deployment": changes == "learner", learner: changes == "actor"}


def test_the_learner_takes_the_place_of_actors_and_of_nobody_else() -> None:
    """Pods without a class have the priority 0; the class is of no run, for all share it."""
    pods, [priority] = pod_templates(render("gpu", "priority")), read("components/priority/priority-class.yaml")
    assert pods["outrider-actor"]["spec"]["priorityClassName"] == priority["metadata"]["name"]
    assert "priorityClassName" not in pods["outrider-learner"]["spec"]
    assert -10 <= priority["value"] < 0
    assert priority["preemptionPolicy"] == "Never"
    cluster_wide = {manifest["kind"] for variant in VARIANTS for manifest in render(*variant)} & {"PriorityClass"}
    assert cluster_wide == set()


def test_every_overlay_and_component_is_rendered_somewhere() -> None:
    folders = {path.parent.name for path in K8S.glob("*/*/kustomization.yaml") if path.parent.parent.name != "base"}
    assert folders == {name for variant in VARIANTS for name in variant}
