"""A learner that gets SIGKILL again and again, also while it writes a checkpoint: the end is that of a run without.

The learner is the real one, in a process of its own, and so are gRPC and the weight epochs; the actor is in the test's
process, with a fake engine: what it samples is a function of prompt and seed, so a synchronous run has exactly one
outcome.
"""

import asyncio
import contextlib
import functools
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import pytest
import yaml

from actor.config import ActorConfig
from actor.engine import EngineRequest
from actor.server import ActorServer
from common.types import Completion, PromptInfo
from examples.digits.model import build_model
from learner.storage.checkpoint import latest_checkpoint
from tests.helpers.digits_engine import DigitsEngine, DigitsPrompt
from tests.helpers.launched import Launched, launching, read_metrics

BATCH = 2
# Of a learner without a kill, on a busy machine.
START_S, STEP_S = 100.0, 2.0
# To end a step with a checkpoint.
STOP_S = 20.0


class Pace:
    """How many groups an actor may sample; None: any number."""

    def __init__(self, num_groups: int | None = None) -> None:
        self._num_groups = num_groups
        self._released = asyncio.Event()

    async def keep(self) -> None:
        """Wait for the turn of one group."""
        if self._num_groups is not None:
            self._num_groups -= 1
            if self._num_groups < 0:
                await self._released.wait()

    def release(self) -> None:
        """From now on any number."""
        self._num_groups = None
        self._released.set()


class PacedEngine(DigitsEngine):
    pace: Pace

    async def generate(self, request: EngineRequest) -> AsyncIterator[PromptInfo | list[Completion]]:
        """See `Engine.generate`."""
        await self.pace.keep()
        async for part in super().generate(request):
            yield part


@asynccontextmanager
async def serving(model_dir: Path, pace: "Pace | None" = None) -> AsyncIterator[str]:
    """An actor in this process; its address."""
    config = ActorConfig.model_validate(
        {"engine": "fake", "fake": {"token_s": 0.0, "first_token_s": 0.0, "vocab_size": 256, "mean_tokens": 3}}
    )
    engine = PacedEngine(config.fake, "actor", DigitsPrompt.of(model_dir))
    engine.pace = pace or Pace()
    server = ActorServer(engine, await engine.start(), config, "actor")
    try:
        yield f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    finally:
        await server.stop(grace_s=0)
        await engine.stop()


def settings(model_dir: Path, runs_dir: Path, address: str, num_steps: int) -> dict[str, Any]:
    return {
        "model": {"path": str(model_dir)},
        "data": {"train": "examples.digits.data:train"},
        "reward": {"functions": ["tests.helpers.reward_functions:sum_of_ids"], "num_processes": 1},
        "rollout": {"actors": [address], "n": 2, "max_tokens": 4, "seed": 5},
        "algorithm": {"clip_low": 1.0, "clip_high": 1000.0},
        "optimizer": {"lr": 1e-3},
        "trainer": {
            "total_steps": num_steps,
            "batch_prompts": BATCH,
            "checkpoint_every": 1,
            "max_mean_parity_diff": None,
        },
        "runs_dir": str(runs_dir),
    }


def learn(settings: dict[str, Any], output: Path) -> None:
    """The learner, in a process of its own, on one thread."""
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from learner.config import LearnerConfig
    from learner.run import run

    torch.set_num_threads(1)
    try:
        sys.exit(run(LearnerConfig.model_validate(settings)))
    except KeyboardInterrupt:
        sys.exit(130)


class Learner:
    """A learner that is killed at the end of the block.

    The modules that take seconds to import are imported once, by the server that forks it.
    """

    def __init__(self, settings: dict[str, Any], output: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["learner.run", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"])
        self._output = output
        output.parent.mkdir(exist_ok=True)
        self._process: BaseProcess = context.Process(target=learn, args=(settings, output))
        self._process.start()

    async def finished(self) -> None:
        """Wait for its end, which must be a good one."""
        while self._process.exitcode is None:  # noqa: ASYNC110 - a process has no event
            await asyncio.sleep(0.02)
        assert self._process.exitcode == 0, self._output.read_text()[-3000:]

    async def ends_before(self, moment: Coroutine[Any, Any, None]) -> bool:
        """Whether it ends, as it should, before the moment has come."""
        waiting = {asyncio.ensure_future(self.finished()), asyncio.ensure_future(moment)}
        done, left = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        for task in done:
            task.result()
        return self._process.exitcode is not None

    async def stopped(self) -> str:
        """Ask it to stop; what it says, once it has ended."""
        self._process.terminate()
        async with asyncio.timeout(STOP_S):
            while self._process.exitcode is None:  # noqa: ASYNC110 - a process has no event
                await asyncio.sleep(0.02)
        assert self._process.exitcode == 130, self._output.read_text()[-3000:]
        return self._output.read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def partials(runs_dir: Path) -> set[tuple[Path, int]]:
    """Checkpoints that have been begun and not finished; those of earlier kills too."""
    found = set()
    for path in runs_dir.glob("*/checkpoints/.*.partial"):
        with contextlib.suppress(FileNotFoundError):  # it has just been finished
            found.add((path, path.stat().st_ino))
    return found


async def run_to_the_end(configuration: dict[str, Any], kills: int, seed: int) -> int:
    """Of so many kills those that hit a checkpoint that was being written."""
    rng = random.Random(seed)
    runs_dir = Path(configuration["runs_dir"])
    num_writing = 0
    for _ in range(kills):
        before = partials(runs_dir)
        wait_s, in_checkpoint, count = rng.uniform(0.0, 4.0), rng.random() < 0.5, rng.randint(1, 3)
        moment = writing_checkpoint(runs_dir, count) if in_checkpoint else asyncio.sleep(wait_s)
        with Learner(configuration, runs_dir / "output") as learner:
            assert not await learner.ends_before(moment), "the run is too short for so many kills"
        num_writing += bool(partials(runs_dir) - before)
    with Learner(configuration, runs_dir / "output") as learner:
        async with asyncio.timeout(START_S + STEP_S * configuration["trainer"]["total_steps"]):
            await learner.finished()
    return num_writing


async def writing_checkpoint(runs_dir: Path, count: int) -> None:
    """Until so many checkpoints more have been begun, and the last of them is being written."""
    seen = partials(runs_dir)
    while count:
        new = partials(runs_dir) - seen
        seen |= new
        count -= min(count, len(new))
        await asyncio.sleep(0)


async def check(tmp_path: Path, num_steps: int, kills: int, seed: int) -> None:
    model_dir = build_model(tmp_path / "model", seed=0)
    undisturbed, killed = runs_dirs = [tmp_path / "undisturbed", tmp_path / "killed"]
    async with serving(model_dir) as address:
        await run_to_the_end(settings(model_dir, undisturbed, address, num_steps), 0, seed)
        num_writing = await run_to_the_end(settings(model_dir, killed, address, num_steps), kills, seed)
    print(f"{kills} kills, {num_writing} of them inside of a checkpoint")
    compare(num_steps, model_dir, *map(only_run, runs_dirs))


def only_run(runs_dir: Path) -> Path:
    [run_dir] = runs_dir.glob("run-*/")
    return run_dir


def compare(num_steps: int, model_dir: Path, undisturbed: Path, killed: Path) -> None:
    for run_dir in (undisturbed, killed):
        steps = {line["step"]: line["sequences"] for line in read_metrics(run_dir)}
        assert sorted(steps) == list(range(1, num_steps + 1))
        trained = [sequence for step in sorted(steps) for sequence in steps[step]]
        assert sorted(trained) == list(range(num_steps * BATCH))
        assert not list(run_dir.glob("checkpoints/.*"))
    weights = [run_dir / "export" / "model.safetensors" for run_dir in (undisturbed, killed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert weights[0].read_bytes() != (model_dir / "model.safetensors").read_bytes()


async def test_some_kills_change_nothing(tmp_path: Path) -> None:
    await check(tmp_path, num_steps=24, kills=4, seed=1)


async def test_a_stop_while_no_batch_comes_costs_no_step(tmp_path: Path) -> None:
    """There is no checkpoint but that of the stop, and of the last step."""
    num_steps, held_at = 4, 2
    runs_dir, pace = tmp_path / "runs", Pace(num_groups=held_at * BATCH + 1)
    model_dir = build_model(tmp_path / "model", seed=0)
    async with serving(model_dir, pace) as address:
        configuration = settings(model_dir, runs_dir, address, num_steps)
        configuration["trainer"]["checkpoint_every"] = 0
        with Learner(configuration, runs_dir / "output") as learner:
            await steps_done(runs_dir, held_at)
            check_stopped_at(held_at, runs_dir, await learner.stopped())
        pace.release()
        await run_to_the_end(configuration, 0, seed=0)
    lines = read_metrics(only_run(runs_dir))
    assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
    assert sorted(sequence for line in lines for sequence in line["sequences"]) == list(range(num_steps * BATCH))


async def test_two_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    """A node of torchrun's may be told alone: the signal goes to the rank that talks to nobody."""
    model_dir = build_model(tmp_path / "model", seed=0)
    runs_dir, file = tmp_path / "runs", tmp_path / "run.yaml"
    async with serving(model_dir) as address:
        configuration = settings(model_dir, runs_dir, address, num_steps=1000)
        configuration["trainer"]["checkpoint_every"] = 0
        file.write_text(yaml.safe_dump(configuration))
        arguments = ("--standalone", "--nproc-per-node", "2", "-m", "learner", "--config", str(file))
        with launching(tmp_path / "output") as launch:
            launched = launch(*arguments, module="torch.distributed.run")
            await steps_done(runs_dir, 2)
            os.kill(launched.pid_of_rank(1), signal.SIGTERM)
            await asyncio.to_thread(launched.exit_code, STOP_S)
            check_stopped_at(last_step(runs_dir), runs_dir, launched.stdout)
            assert launched.stderr.count("learner: stopped") == 2


async def test_a_stop_that_every_process_hears_loses_no_prompt(tmp_path: Path) -> None:
    """As torchrun sends it: a step is trained, and a group of the next one is being scored."""
    model_dir = build_model(tmp_path / "model", seed=0)
    runs_dir, file = tmp_path / "runs", tmp_path / "run.yaml"
    async with serving(model_dir) as address:
        configuration = settings(model_dir, runs_dir, address, num_steps=3)
        configuration["trainer"]["max_staleness"] = 1
        configuration["reward"]["functions"] = ["tests.helpers.reward_functions:takes_a_while"]
        file.write_text(yaml.safe_dump(configuration))
        with launching(tmp_path / "output") as launch:
            launched = launch("--config", str(file), module="learner")
            scores_ahead = functools.partial(_scores_ahead, launched)
            await asyncio.to_thread(launched.until, scores_ahead, START_S, "a group of the second step")
            os.killpg(launched.process.pid, signal.SIGTERM)
            assert await asyncio.to_thread(launched.exit_code, STOP_S) == 130, launched.said()
            check_stopped_at(1, runs_dir, launched.stdout)
            assert ledger_of(only_run(runs_dir))["dropped"] == {}
        await run_to_the_end(configuration, 0, seed=0)
    lines, ledger = read_metrics(only_run(runs_dir)), ledger_of(only_run(runs_dir))
    assert [line["step"] for line in lines] == [1, 2, 3]
    trained = [sequence for line in lines for sequence in line["sequences"]]
    assert sorted(trained + ledger["in_flight"]) == list(range(ledger["cursor"]))
    assert ledger["dropped"] == {}


def _scores_ahead(launched: Launched) -> bool:
    return launched.stdout.count("begun") > BATCH


def ledger_of(run_dir: Path) -> dict[str, Any]:
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    ledger: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())["ledger"]
    return ledger


async def steps_done(runs_dir: Path, step: int) -> None:
    async with asyncio.timeout(START_S):
        while last_step(runs_dir) < step:  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(0.02)


def last_step(runs_dir: Path) -> int:
    return max((line["step"] for run_dir in runs_dir.glob("run-*/") for line in read_metrics(run_dir)), default=0)


def check_stopped_at(step: int, runs_dir: Path, said: str) -> None:
    assert f"stopping: the checkpoint of step {step} is written; started again, the run goes on from it" in said
    assert latest_checkpoint(only_run(runs_dir)) == only_run(runs_dir) / "checkpoints" / f"step-{step:06}"
    assert last_step(runs_dir) == step


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    await check(tmp_path, num_steps=250, kills=50, seed=2)
