"""The parts of the runner of manifests that decide something: policies, names, probes."""

import asyncio
import contextlib

import grpc
import pytest
from dnslib import QTYPE, RCODE, DNSRecord
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.manifests.rendered import Manifest, render, tool
from tests.manifests.runner.names import answer
from tests.manifests.runner.packet_filter import Opening, Peer, decide
from tests.manifests.runner.probe import Probe, ask, watch
from tests.manifests.runner.volumes import parse_size

TCP, UDP = 6, 17
ACTOR = Peer(
    "10.0.0.1", {"app.kubernetes.io/name": "outrider-actor", "app.kubernetes.io/part-of": "outrider"}, "outrider"
)
LEARNER = Peer(
    "10.0.0.2", {"app.kubernetes.io/name": "outrider-learner", "app.kubernetes.io/part-of": "outrider"}, "outrider"
)
CLIENT = Peer("10.0.0.3", {"outrider.dev/client": "true"}, "outrider")
STRANGER = Peer("10.0.0.4", {}, "outrider")
DNS = Peer("10.0.0.5", {"k8s-app": "kube-dns"}, "kube-system")
FALSE_DNS = Peer("10.0.0.6", {"k8s-app": "kube-dns"}, "outrider")
PROMETHEUS = Peer("10.0.0.7", {}, "monitoring")
FOREIGN_ACTOR = Peer("10.0.0.8", ACTOR.labels, "elsewhere")
COLLECTOR = Peer("10.0.0.9", {}, "tracing")
ALL = (ACTOR, LEARNER, CLIENT, STRANGER, DNS, FALSE_DNS, PROMETHEUS, FOREIGN_ACTOR, COLLECTOR)

ASK_NAMES = [Opening(DNS.address, TCP, 53, 53), Opening(DNS.address, UDP, 53, 53)]


def _rules(pod: Peer, *variant: str) -> tuple[list[Opening] | None, list[Opening] | None]:
    policies = [manifest for manifest in render(*variant) if manifest["kind"] == "NetworkPolicy"]
    rules = decide(policies, pod, [peer for peer in ALL if peer != pod])
    return rules.ingress, rules.egress


def test_learner_and_actors_have_each_other_and_names() -> None:
    ingress, egress = _rules(LEARNER, "cpu-demo")
    actor = Opening(ACTOR.address, TCP, 1024, 65535)
    assert ingress == [actor]
    assert egress == sorted([actor, *ASK_NAMES])


def test_clients_come_in_at_one_port_and_prometheus_only_with_the_component() -> None:
    learner, client = Opening(LEARNER.address, TCP, 1024, 65535), Opening(CLIENT.address, TCP, 50051, 50051)
    assert _rules(ACTOR, "cpu-demo")[0] == [learner, client]
    assert _rules(ACTOR, "cpu-demo", "monitoring")[0] == [learner, client, Opening(PROMETHEUS.address, TCP, 9090, 9090)]
    assert _rules(CLIENT, "cpu-demo") == ([], sorted([Opening(ACTOR.address, TCP, 50051, 50051), *ASK_NAMES]))


@pytest.mark.parametrize("pod", [ACTOR, LEARNER])
def test_spans_leave_to_collectors_only_with_the_component(pod: Peer) -> None:
    without = _rules(pod, "gpu")[1]
    spans = [Opening(COLLECTOR.address, TCP, port, port) for port in (4317, 4318)]
    assert without is not None
    assert _rules(pod, "gpu", "tracing")[1] == sorted([*without, *spans])
    assert _rules(pod, "gpu", "tracing")[0] == _rules(pod, "gpu")[0]


def test_strangers_are_shut_in_and_other_namespaces_are_left_alone() -> None:
    assert _rules(STRANGER, "gpu") == ([], [])
    assert _rules(FOREIGN_ACTOR, "gpu") == (None, None)


def test_a_policy_of_one_direction_leaves_the_other_open() -> None:
    policy: Manifest = {
        "metadata": {"namespace": "outrider"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    }
    rules = decide([policy], STRANGER, ALL)
    assert (rules.ingress, rules.egress) == ([], None)


def _ask_name(name: str, kind: str = "A") -> tuple[int, list[str]]:
    names = {"actors.outrider.svc.cluster.local": ["10.0.0.1", "10.0.0.2"], "empty.outrider.svc.cluster.local": []}
    reply = DNSRecord.parse(answer(DNSRecord.question(name, kind).pack(), names))
    return reply.header.rcode, [str(record.rdata) for record in reply.rr if record.rtype == QTYPE.A]


def test_names_answer_with_addresses() -> None:
    assert _ask_name("actors.outrider.svc.cluster.local") == (RCODE.NOERROR, ["10.0.0.1", "10.0.0.2"])
    assert _ask_name("Actors.Outrider.svc.cluster.local.") == (RCODE.NOERROR, ["10.0.0.1", "10.0.0.2"])


def test_a_name_without_addresses_is_not_a_name_that_is_unknown() -> None:
    assert _ask_name("empty.outrider.svc.cluster.local") == (RCODE.NOERROR, [])
    assert _ask_name("actors.outrider.svc.cluster.local", "AAAA") == (RCODE.NOERROR, [])
    assert _ask_name("other.outrider.svc.cluster.local") == (RCODE.NXDOMAIN, [])


def test_numbers_of_a_probe() -> None:
    assert Probe.of({"grpc": {"port": 1}}) == Probe(1, "", 10, 1, 3, 1)
    numbers = {"periodSeconds": 2, "timeoutSeconds": 3, "failureThreshold": 4, "successThreshold": 5}
    assert Probe.of({"grpc": {"port": 1, "service": "liveness"}, **numbers}) == Probe(1, "liveness", 2, 3, 4, 5)


@pytest.mark.parametrize(("failures", "successes"), [(1, 1), (3, 2)])
async def test_a_probe_decides_after_so_many_answers(failures: int, successes: int) -> None:
    server, servicer = grpc.aio.server(), health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    probe = Probe(
        port, "readiness", period_s=0.05, timeout_s=5, failure_threshold=failures, success_threshold=successes
    )
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    await servicer.set("readiness", not_serving)
    assert await ask("127.0.0.1", probe) is False

    verdicts: asyncio.Queue[bool] = asyncio.Queue()
    watching = asyncio.create_task(watch("127.0.0.1", probe, verdicts.put_nowait))
    assert await asyncio.wait_for(verdicts.get(), 30) is False
    await servicer.set("readiness", serving)
    while not await asyncio.wait_for(verdicts.get(), 30):
        pass
    assert await ask("127.0.0.1", probe) is True
    await server.stop(0)
    while await asyncio.wait_for(verdicts.get(), 30):
        pass
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching


async def test_one_answer_too_few_decides_nothing() -> None:
    probe = Probe(1, "", period_s=0.01, timeout_s=5, failure_threshold=1000, success_threshold=1)
    verdicts: list[bool] = []
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(watch("127.0.0.1", probe, verdicts.append), 0.3)
    assert verdicts == []


def test_sizes() -> None:
    assert (parse_size("100Mi"), parse_size("2Gi")) == (104_857_600, 2_147_483_648)
    with pytest.raises(NotImplementedError, match="size 2G"):
        parse_size("2G")


def test_a_tool_that_is_missing_is_a_failure_in_one_line() -> None:
    with pytest.raises(pytest.fail.Exception) as caught:
        tool("no-such-tool", "install it")
    assert str(caught.value) == "no-such-tool is not installed: install it"
