"""The rendered cpu-demo, executed by the runner of manifests: confinement, policies, scaling, a rolling update."""

from pathlib import Path
from typing import Any

import pytest

from tests.manifests.scenarios import play

GIB = 2**30

# Engines that load one after another, beside others: minutes on a machine that is busy.
pytestmark = pytest.mark.timeout(1300)


@pytest.fixture(scope="module")
def confinement(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return play("confinement", tmp_path_factory.mktemp("confinement"), 300)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return play("demo", tmp_path_factory.mktemp("demo"), 1200)


def test_a_container_is_confined_as_its_manifest_says(confinement: dict[str, Any]) -> None:
    inside = confinement["actor"]
    assert inside["user"] == [10001, 10001, [10001]]
    assert inside["capabilities"] == [0, 0, 0]
    assert inside["no_new_privileges"] == "1"
    assert inside["pid"] == 1
    assert inside["hostname"] == "actor"
    assert inside["writable"] == ["/cache", "/tmp", "/dev/shm"]
    assert inside["shared_memory_bytes"] == 2 * GIB
    assert inside["service_variables"] == []
    assert inside["config"] == ["actor.yaml"]


def test_a_stranger_reaches_nobody_and_resolves_nothing(confinement: dict[str, Any]) -> None:
    assert confinement["stranger"]["reachable"] == []
    assert confinement["stranger"]["names"] == {"outrider-actors": None, "outrider-actors-ready": None}


def test_without_policies_the_same_pod_reaches_everything(confinement: dict[str, Any]) -> None:
    assert confinement["without_policies"]["reachable"] == confinement["targets"]
    assert confinement["without_policies"]["names"]["outrider-actors"] == confinement["addresses"]


def test_a_client_reaches_the_port_for_clients_only(confinement: dict[str, Any]) -> None:
    grpc, _metrics, _metadata = confinement["targets"]
    assert confinement["client"]["reachable"] == [grpc]
    assert confinement["client"]["names"]["outrider-actors-ready"] == confinement["addresses"]


def test_members_reach_each_other_and_not_the_metadata_of_a_cloud(confinement: dict[str, Any]) -> None:
    grpc, metrics, _metadata = confinement["targets"]
    assert confinement["actor"]["reachable"] == [grpc, metrics]


def test_actors_are_scaled_and_come_back(confinement: dict[str, Any]) -> None:
    assert (confinement["scaled_up"], confinement["ready_at_once"]) == (4, 1)
    codes = sorted(actor["codes"] for actor in confinement["actors"])
    assert codes == [[0], [0], [0], [137, 0]]  # the last one was killed by the scenario
    assert not any(actor["was_killed"] for actor in confinement["actors"])


@pytest.mark.slow
def test_the_run_goes_on_through_scaling_a_rolling_update_and_a_new_job(demo: dict[str, Any]) -> None:
    steps = demo["steps_at"]
    assert len(steps) == 6
    assert steps == sorted(steps)
    # A checkpoint every two steps, written while the next steps run.
    assert 0 <= steps[-2] - demo["resumed_at"] <= 4
    assert [step["step"] for step in demo["steps"]] == list(range(1, len(demo["steps"]) + 1))


@pytest.mark.slow
def test_nothing_is_lost_or_trained_twice(demo: dict[str, Any]) -> None:
    trained = [sequence for step in demo["steps"] for sequence in step["sequences"]]
    assert sorted(trained) == list(range(len(trained)))
    assert {len(step["sequences"]) for step in demo["steps"]} == {8}
    assert not any(step["groups_dropped"] for step in demo["steps"])


@pytest.mark.slow
def test_learner_and_actors_agree_at_every_step(demo: dict[str, Any]) -> None:
    assert all(step["parity_max_abs_diff"] < 1e-4 for step in demo["steps"])


@pytest.mark.slow
def test_every_pod_ends_within_its_grace(demo: dict[str, Any]) -> None:
    actors = [pod for pod in demo["pods"] if pod["name"].startswith("outrider-actor")]
    learners = [pod for pod in demo["pods"] if not pod["name"].startswith("outrider-actor")]
    assert (len(actors), len(learners)) == (3, 2)
    assert all((pod["codes"], pod["was_killed"], pod["restarts"]) == ([0], False, 0) for pod in actors), actors
    assert not any(pod["was_killed"] for pod in learners), learners


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_whole_demo_reaches_its_accuracy(tmp_path: Path) -> None:
    seen = play("whole-demo", tmp_path, 2900)
    assert [step["step"] for step in seen["steps"]] == list(range(1, 121))
    assert seen["summary"]["accuracy_before"] < 0.5
    assert seen["summary"]["accuracy_after"] > 0.9
    assert sum(pod["name"].startswith("outrider-actor") for pod in seen["pods"]) == 4
    assert not any(pod["was_killed"] for pod in seen["pods"])


@pytest.mark.slow
def test_a_run_with_certificates_goes_on_when_they_are_renewed(tmp_path: Path) -> None:
    seen = play("mutual-tls", tmp_path, 1200)
    assert seen["steps_at"] == sorted(seen["steps_at"])
    assert [step["step"] for step in seen["steps"]] == list(range(1, len(seen["steps"]) + 1))
    assert all(step["parity_max_abs_diff"] < 1e-4 for step in seen["steps"])
    assert not any(step["groups_dropped"] for step in seen["steps"])
    assert [pod["restarts"] for pod in seen["pods"]] == [0] * len(seen["pods"])
    # Who calls without a certificate is not answered; a reader sees both actors, in plain sight of their states.
    code, text = seen["plaintext"]
    assert code == 1
    assert text.count("no answer: UNREACHABLE") == 2
    code, text = seen["reader"]
    assert code == 0
    rows = [line.split() for line in text.splitlines()[1:]]
    assert [row[0] for row in sorted(rows)] == [f"{address}:50051" for address in seen["addresses"]]
    assert {row[2] for row in rows} == {"serving"}


def test_a_mistake_of_the_user_fails_the_job_at_once(tmp_path: Path) -> None:
    seen = play("mistake", tmp_path, 120)
    [pod] = seen["pods"]
    assert pod["codes"] == [2]
    assert "batch_promts" in next(line for line in seen["log"].splitlines() if line.startswith("learner: "))
    assert "Traceback" not in seen["log"]
