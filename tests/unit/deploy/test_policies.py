"""The rules hold for every overlay and component, and each of them notices what it is there for."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.manifests import policies
from tests.manifests.rendered import VARIANTS, Manifest, config_data, containers, find, pod_templates, render

Rule = Callable[[list[Manifest]], list[str]]


@pytest.mark.parametrize("rule", policies.RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("variant", VARIANTS, ids="+".join)
def test_rule_holds(variant: tuple[str, ...], rule: Rule) -> None:
    assert rule(render(*variant)) == []


def _pod(manifests: list[Manifest], name: str = "outrider-actor") -> Any:
    return pod_templates(manifests)[name]["spec"]


def _actor(manifests: list[Manifest]) -> Any:
    return containers(pod_templates(manifests)["outrider-actor"], init=False)[0]


def _replace(key: str, old: str, new: str) -> Callable[[list[Manifest]], None]:
    def change(manifests: list[Manifest]) -> None:
        config = config_data(manifests, key)
        assert old in config[key]
        config[key] = config[key].replace(old, new)

    return change


MISTAKES: list[tuple[Rule, Callable[[list[Manifest]], Any], str]] = [
    (
        policies.selectors_meet,
        lambda all_: find(all_, "Service", "outrider-actors")["spec"]["selector"].update({"app": "other"}),
        "Service outrider-actors selects the pods of nothing",
    ),
    (
        policies.selectors_meet,
        lambda all_: find(all_, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"].update(name="actors"),
        "HorizontalPodAutoscaler outrider-actor scales actors, which is not there",
    ),
    (
        policies.ports_meet,
        lambda all_: find(all_, "PodMonitor", "outrider-actor")["spec"]["podMetricsEndpoints"][0].update(port="http"),
        "outrider-actor: no port http in its pods",
    ),
    (
        policies.ports_meet,
        lambda all_: _actor(all_)["livenessProbe"]["grpc"].update(port=50052),
        "livenessProbe asks port 50052, which is not declared",
    ),
    (policies.config_is_read, _replace("actor.yaml", "grace_s", "grace"), "actor.yaml: grace: unknown key"),
    (policies.config_is_read, _replace("run.yaml", "batch_prompts", "batch_size"), "unknown key"),
    (policies.config_is_read, _replace("actor.yaml", "0.0.0.0:50051", "127.0.0.1:50051"), "the actor listens on 127"),
    (policies.config_is_read, _replace("actor.yaml", "insecure: true", "insecure: false"), "refuse to listen"),
    (
        policies.config_is_read,
        _replace("actor.yaml", "/models/policy", "/models/other"),
        "the actor loads /models/other",
    ),
    (policies.config_is_read, _replace("actor.yaml", "0.0.0.0:9090", "0.0.0.0:9091"), "metrics are at 0.0.0.0:9091"),
    (
        policies.config_is_read,
        lambda all_: find(all_, "Service", "outrider-actors")["spec"].pop("publishNotReadyAddresses"),
        "outrider-actors is not a headless Service",
    ),
    (
        policies.grace_suffices,
        lambda all_: _pod(all_).update(terminationGracePeriodSeconds=130),
        "grace 130 s is not more than preStop, drain and exit, 130 s",
    ),
    (
        policies.probes_are_right,
        lambda all_: _actor(all_)["livenessProbe"]["grpc"].update(service="readiness"),
        "livenessProbe asks 'readiness'",
    ),
    (policies.pods_are_confined, lambda all_: _pod(all_).pop("enableServiceLinks"), "gets variables for Services"),
    (policies.pods_are_confined, lambda all_: _pod(all_)["securityContext"].pop("runAsUser"), "runs as root"),
    (policies.pods_are_confined, lambda all_: _actor(all_)["env"].clear(), "does not cache in a volume"),
    (
        policies.references_exist,
        lambda all_: all_.remove(find(all_, "PersistentVolumeClaim", "outrider-runs")),
        "outrider-learner names PersistentVolumeClaim outrider-runs, which is not there",
    ),
    (
        policies.ranks_are_one_job,
        lambda all_: find(all_, "Job")["spec"].update(completions=2, parallelism=2),
        "PET_NNODES is not 2",
    ),
    (
        policies.nothing_leaves,
        lambda all_: find(all_, "NetworkPolicy", "outrider-dns")["spec"]["egress"][0].update(
            to=[{"ipBlock": {"cidr": "0.0.0.0/0"}}]
        ),
        "a rule is open to all",
    ),
    (
        policies.nothing_leaves,
        lambda all_: all_.remove(find(all_, "NetworkPolicy", "outrider-default-deny")),
        "there is no policy that denies everything",
    ),
    (
        policies.names_are_plain,
        lambda all_: find(all_, "Service", "outrider-actors")["metadata"].update(name="vllm-actors"),
        "its variables would be read by vLLM",
    ),
]


@pytest.mark.parametrize(("rule", "mistake", "problem"), MISTAKES)
def test_mistake_is_noticed(rule: Rule, mistake: Callable[[list[Manifest]], Any], problem: str) -> None:
    manifests = render("gpu", "hpa", "monitoring")
    mistake(manifests)
    assert any(problem in found for found in rule(manifests)), rule(manifests)


TLS_MISTAKES: list[tuple[Rule, Callable[[list[Manifest]], Any], str]] = [
    (
        policies.certificates_meet,
        lambda all_: find(all_, "Certificate", "outrider-learner-tls")["spec"].update(dnsNames=["actor.outrider"]),
        "outrider-learner finds no certificate for learner.outrider in /etc/outrider-tls",
    ),
    (
        policies.certificates_meet,
        lambda all_: _actor(all_)["args"].remove("tls=/etc/outrider-tls"),
        "only one of actor and learner has certificates",
    ),
    (
        policies.config_is_read,
        lambda all_: _actor(all_)["args"].remove("health_listen=0.0.0.0:50052"),
        "probes have no certificate: the actor needs a health_listen on a port that is declared",
    ),
]


@pytest.mark.parametrize(("rule", "mistake", "problem"), TLS_MISTAKES)
def test_mistake_with_certificates_is_noticed(
    rule: Rule, mistake: Callable[[list[Manifest]], Any], problem: str
) -> None:
    manifests = render("gpu", "mtls")
    mistake(manifests)
    assert any(problem in found for found in rule(manifests)), rule(manifests)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "2"}}, False),
        ({"matchLabels": {"b": "1"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["0", "1"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["0", "1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "DoesNotExist"}], "matchLabels": {"a": "1"}}, True),
    ],
)
def test_selectors_match_as_in_kubernetes(selector: Manifest, expected: bool) -> None:
    assert policies.matches(selector, {"a": "1"}) is expected
