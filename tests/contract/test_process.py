"""`python -m actor` as a user starts it, with the fake engine."""

import asyncio
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from common import errors
from common.errors import from_rpc_error
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.pb.rollout.v1.rollout_pb2_grpc import RolloutServiceStub
from common.pb.weights.v1 import weights_pb2
from common.pb.weights.v1.weights_pb2_grpc import WeightServiceStub
from common.rpc.channel import open_channel
from common.rpc.server import join_address, reserve_port
from tests.helpers.fake_actors import Launch, png
from tests.helpers.launched import ROOT


def _slow_request(max_tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(n=2, max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(group_id="g", text="x", sampling=sampling)


async def _draining(weights: Any) -> None:
    """Wait until the actor has taken the signal."""
    request, draining = weights_pb2.GetStatusRequest(), weights_pb2.ACTOR_STATE_DRAINING
    while (await weights.GetStatus(request)).state != draining:  # noqa: ASYNC110 - it is another process
        await asyncio.sleep(0.01)


FAKE = ("--engine", "fake", "--listen", "127.0.0.1:0")


async def test_sigterm_drains(launch: Launch) -> None:
    """Readiness goes off, the running group finishes, new ones are refused with DRAINING, the exit code is 0."""
    actor = await launch(*FAKE, "--standalone", "fake.token_s=0.1")
    channel = open_channel(actor.address)
    rollouts, weights = RolloutServiceStub(channel), WeightServiceStub(channel)
    call = rollouts.Generate(_slow_request(max_tokens=16))
    first: Any = await call.read()
    assert first.HasField("prompt")
    actor.process.send_signal(signal.SIGTERM)
    await _draining(weights)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await rollouts.Generate(_slow_request(max_tokens=1)).read()
    assert isinstance(from_rpc_error(raised.value), errors.Draining)
    items = [item async for event in call for item in event.completions.items]
    assert [len(item.token_ids) for item in items] == [16, 16]
    assert await call.code() == grpc.StatusCode.OK
    assert await actor.exit_code(timeout_s=3) == 0
    await channel.close()


async def test_the_grace_period_ends(launch: Launch) -> None:
    actor = await launch(*FAKE, "--standalone", "fake.token_s=1", "grace_s=0.3")
    channel = open_channel(actor.address)
    call = RolloutServiceStub(channel).Generate(_slow_request(max_tokens=60))
    await call.read()
    actor.process.send_signal(signal.SIGTERM)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert isinstance(from_rpc_error(raised.value), errors.Unreachable)
    assert await actor.exit_code(timeout_s=3) == 0
    await channel.close()


async def test_the_second_signal_insists(launch: Launch) -> None:
    actor = await launch(*FAKE, "--standalone", "fake.token_s=1")
    channel = open_channel(actor.address)
    call = RolloutServiceStub(channel).Generate(_slow_request(max_tokens=60))
    await call.read()
    actor.process.send_signal(signal.SIGINT)
    await _draining(WeightServiceStub(channel))
    assert actor.process.returncode is None
    actor.process.send_signal(signal.SIGINT)
    assert await actor.exit_code(timeout_s=3) == 0
    await channel.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_while_loading(launch: Launch, number: signal.Signals) -> None:
    actor = await launch(*FAKE, "fake.start_s=60", wait_ready=False)
    assert actor.process.stderr is not None
    assert b'"loading"' in await actor.process.stderr.readline()
    started_s = time.monotonic()
    actor.process.send_signal(number)
    assert await actor.exit_code(timeout_s=5) == 0
    assert time.monotonic() - started_s < 5
    assert b"Traceback" not in await actor.process.stderr.read()


async def test_it_waits_for_a_learner(launch: Launch) -> None:
    actor = await launch(*FAKE)
    channel = open_channel(actor.address)
    status = await WeightServiceStub(channel).GetStatus(weights_pb2.GetStatusRequest())
    assert status.state == weights_pb2.ACTOR_STATE_PENDING_WEIGHTS
    await channel.close()


async def test_it_leaves_when_nobody_calls(launch: Launch) -> None:
    actor = await launch(*FAKE, "idle_exit_s=1.5")
    channel = open_channel(actor.address)
    weights = WeightServiceStub(channel)
    for _ in range(4):  # 2 s in all: calls keep it alive
        await weights.GetStatus(weights_pb2.GetStatusRequest())
        await asyncio.sleep(0.5)
    assert actor.process.returncode is None
    assert await actor.exit_code(timeout_s=5) == 0
    await channel.close()


async def test_a_dead_engine_ends_the_process(launch: Launch) -> None:
    actor = await launch(*FAKE, "--standalone", "fake.die_at_group=1")
    channel = open_channel(actor.address)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await RolloutServiceStub(channel).Generate(_slow_request(max_tokens=1)).read()
    assert isinstance(from_rpc_error(raised.value), errors.EngineDead)
    assert await actor.exit_code(timeout_s=5) == 1
    await channel.close()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "actor: model: is missing; give a checkpoint directory with --model"),
        (
            ("--model", "no/such/place"),
            "actor: model: no/such/place holds no checkpoint (config.json); give a directory in Hugging Face format, "
            "as `hf download NAME --local-dir DIRECTORY` makes it of a model of the hub",
        ),
        ((*FAKE, "vllm.dytpe=float32"), "actor: configuration: vllm.dytpe: unknown key; did you mean dtype?"),
        (
            ("--engine", "fake", "--listen", "127.0.0.1"),
            "actor: '127.0.0.1' is not an address; write host:port, as 127.0.0.1:50051",
        ),
        (("--config", "no.yaml"), "actor: no.yaml: No such file or directory; give the path of a YAML file"),
    ],
)
async def test_a_mistake_is_one_line_and_exit_code_2(launch: Launch, arguments: tuple[str, ...], line: str) -> None:
    actor = await launch(*arguments, wait_ready=False)
    stdout, stderr = await actor.process.communicate()
    assert (actor.process.returncode, stdout, stderr.decode()) == (2, b"", line + "\n")


@pytest.mark.parametrize("key", ["listen", "metrics_listen", "health_listen"])
async def test_a_port_in_use_is_told_before_the_engine_loads(launch: Launch, key: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        actor = await launch(*FAKE, "fake.start_s=600", f"{key}={address}", wait_ready=False)
        stdout, stderr = await actor.process.communicate()
    expected = f"actor: {key}: {address} is in use by another process; stop it or choose another port\n"
    assert (actor.process.returncode, stdout, stderr.decode()) == (2, b"", expected)


async def test_a_port_of_an_actor_that_loads_is_told_before_the_engine_loads(launch: Launch) -> None:
    with reserve_port("127.0.0.1:0", insecure=False) as held:
        address = join_address(*held.getsockname())
        actor = await launch("--engine", "fake", "--listen", address, "fake.start_s=600", wait_ready=False)
        stdout, stderr = await actor.process.communicate()
    expected = f"actor: listen: {address} is in use by another process; stop it or choose another port\n"
    assert (actor.process.returncode, stdout, stderr.decode()) == (2, b"", expected)


async def test_help_is_instant_and_complete(launch: Launch) -> None:
    actor = await launch("--help", wait_ready=False)
    stdout, _ = await actor.process.communicate()
    assert actor.process.returncode == 0
    for flag in ("--model", "--listen", "--engine", "--standalone", "--config", "key=value"):
        assert flag in stdout.decode()


async def test_ask_prints_the_answers(launch: Launch, tmp_path: Path) -> None:
    actor = await launch("--engine", "fake", "--standalone", "--listen", "127.0.0.1:0")
    image = tmp_path / "image.png"
    image.write_bytes(png())
    question = ("--address", actor.address, "--image", str(image), "--n", "3", "--temperature", "1", "What is this?")
    asked = await launch("ask", *question, wait_ready=False)
    stdout, stderr = await asked.process.communicate()
    assert (asked.process.returncode, stderr) == (0, b"")
    assert len(stdout.decode().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "line", "code"),
    [
        (("--image", "no.png", "What?"), "ask: no.png: No such file or directory", 2),
        (("--address", "127.0.0.1:1", "What?"), "ask: 127.0.0.1:1: Connection refused", 1),
        (("--n", "100000", "What?"), "sampling.n: is 100000; must be 1 to 256", 1),
    ],
)
async def test_ask_says_what_is_wrong_in_one_line(
    launch: Launch, arguments: tuple[str, ...], line: str, code: int
) -> None:
    actor = await launch("--engine", "fake", "--standalone", "--listen", "127.0.0.1:0")
    asked = await launch("ask", "--address", actor.address, *arguments, wait_ready=False)
    _, stderr = await asked.process.communicate()
    assert asked.process.returncode == code
    assert line in stderr.decode()
    assert len(stderr.decode().splitlines()) == 1


async def test_fleet_shows_what_actors_say_of_themselves(launch: Launch) -> None:
    actor = await launch("--engine", "fake", "--standalone", "--listen", "127.0.0.1:0")
    shown = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "learner", "fleet", f"dns:///{actor.address}", "127.0.0.1:1"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    stdout, _ = await shown.communicate()
    header, silent, row = stdout.decode().splitlines()
    assert header.split() == ["address", "actor", "state", "version", "staged", "run", "epoch", "running", "waiting"]
    assert silent.split(maxsplit=2) == ["127.0.0.1:1", "-", "no answer: UNREACHABLE: Connection refused"]
    assert row.split()[::2] == [actor.address, "serving", "-", "-", "0"]
    assert shown.returncode == 1
