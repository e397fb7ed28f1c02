"""Whole runs with real vLLM through the launcher: kills of an actor and of the learner, Ctrl-C, two ranks."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common  # noqa: F401 - repairs torchvision before transformers looks for it
from examples.digits.model import build_model
from examples.verl_parquet.make_parquet import make_parquet
from tests.helpers.launched import Launched, actor_pids, free_ports, is_alive, launching, read_metrics, run_dirs

# From the start of two engines on a busy machine to their first step.
START_S = 240
CHECKPOINT_EVERY = 5
BATCH = 64

Launch = Callable[..., Launched]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with launching(tmp_path / "output") as start:
        yield start


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def only_run(launched: Launched, runs_dir: Path) -> Path:
    return launched.until(lambda: next(iter(run_dirs(runs_dir)), None), START_S, "a run folder")


def trained(run_dir: Path) -> list[int]:
    """Sequence numbers of every step that counts: of a step that was taken again after a resume, the last."""
    steps = {line["step"]: line["sequences"] for line in read_metrics(run_dir)}
    return [sequence for step in sorted(steps) for sequence in steps[step]]


@pytest.mark.timeout(900)
def test_kills_of_an_actor_and_of_the_learner_cost_no_group(launch: Launch, tmp_path: Path) -> None:
    command = (
        *("--config", "examples/digits/config.yaml", f"runs_dir={tmp_path / 'runs'}"),
        *(f"model.path={build_model(tmp_path / 'model', seed=0)}", f"local.base_port={free_ports(2)}"),
        *(f"trainer.batch_prompts={BATCH}", "data.max_held_out=8", "trainer.eval_every=0"),
        *("trainer.total_steps=1000", f"trainer.checkpoint_every={CHECKPOINT_EVERY}"),
    )
    first = launch(*command)
    run_dir = only_run(first, tmp_path / "runs")
    first.until(lambda: last_step(run_dir) >= 3, START_S, "step 3")
    before = actor_pids(run_dir)
    (stays, dies) = before
    first.until(lambda: f"actor {stays} serving" in first.stdout, START_S, "the first actor")
    first.until(lambda: f"actor {dies} serving" in first.stdout, START_S, "the second actor")

    os.kill(before[dies], signal.SIGKILL)
    killed_at = last_step(run_dir)
    first.until(lambda: last_step(run_dir) >= killed_at + 3, 60, "steps without the second actor")
    first.until(lambda: first.stdout.count(f"actor {dies} serving") == 2, START_S, "the second actor's return")
    after = actor_pids(run_dir)
    assert after[stays] == before[stays]
    assert after[dies] != before[dies]

    back_at = last_step(run_dir)
    checkpoint = run_dir / "checkpoints" / f"step-{(back_at // CHECKPOINT_EVERY + 2) * CHECKPOINT_EVERY:06}"
    first.until(checkpoint.exists, 120, "a checkpoint")
    learners = [pid for pid in first.left("learner") if pid not in first.left("learner.torchrun")]
    assert len(learners) == 1
    os.kill(learners[0], signal.SIGKILL)
    assert first.exit_code(30) == 1
    [said] = first.stderr.strip().splitlines()[-1:]
    assert said.startswith("outrider: the learner was killed; the same command resumes it.")
    assert all(is_alive(pid) for pid in after.values())
    stopped_at = last_step(run_dir)

    # Less is left to do for the resumed run: a shorter one would be another configuration.
    second = launch(*command)
    second.until(lambda: last_step_resumed(run_dir) >= stopped_at + 5, START_S, "steps after the resume")
    assert run_dirs(tmp_path / "runs") == [run_dir]
    assert f"resuming {run_dir} at step" in second.stdout
    assert actor_pids(run_dir) == after
    assert all(is_alive(pid) for pid in after.values())
    check_stops(second, first)
    assert (run_dir / "checkpoints" / f"step-{last_step_resumed(run_dir):06}").exists()

    sequences = trained(run_dir)
    assert len(sequences) == len(set(sequences)) == BATCH * last_step(run_dir)
    parities = [line["parity_max_abs_diff"] for line in read_metrics(run_dir)]
    assert None not in parities
    assert 0 < max(parities) <= 1e-4


def last_step_resumed(run_dir: Path) -> int:
    """The step that the last line is about."""
    lines = read_metrics(run_dir)
    return lines[-1]["step"] if lines else 0


@pytest.mark.timeout(600)
def test_parquet_in_verls_columns_on_two_ranks_to_the_end(launch: Launch, tmp_path: Path) -> None:
    train, held_out = make_parquet(tmp_path, num_train=24, num_held_out=6)
    model = build_model(tmp_path / "model", seed=0)
    launched = launch(
        *("--config", "examples/verl_parquet/config.yaml", f"runs_dir={tmp_path / 'runs'}", f"model.path={model}"),
        *(f"data.train={train}", f"data.held_out={held_out}", f"local.base_port={free_ports(1)}"),
        *("local.num_ranks=2", "rollout.n=4", "trainer.batch_prompts=8"),
        *("trainer.total_steps=null", "trainer.total_passes=1"),
        'rollout.stop=["0", "1", "2"]',
    )
    assert launched.exit_code(START_S) == 0, launched.said()
    assert not launched.left()
    (run_dir,) = run_dirs(tmp_path / "runs")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 3
    assert 0 <= summary["accuracy_before"] <= 1
    assert 0 <= summary["accuracy_after"] <= 1
    assert summary["completions_per_s"] > 0
    assert 0 < summary["parity_max_abs_diff"] <= 1e-4
    assert summary["wall_s"] > 0
    assert sorted(trained(run_dir)) == list(range(24))
    assert ": 3 steps = 1 pass over 24 rows\n" in launched.stdout
    assert "step    3/3  " in launched.stdout
    check_export(Path(summary["checkpoint"]), model)


@pytest.mark.timeout(600)
def test_the_files_of_a_task_of_ones_own_to_the_end(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that they set, bfloat16 too, but for sizes: of the model, the batch, the fleet."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["examples/your_task", os.environ.get("PYTHONPATH", "")]))
    train, _ = make_parquet(tmp_path, num_train=24, num_held_out=1)
    launched = launch(
        *("--config", "examples/your_task/run.yaml", f"runs_dir={tmp_path / 'runs'}", f"data.train={train}"),
        *(f"model.path={build_model(tmp_path / 'model', seed=0)}", f"local.base_port={free_ports(1)}"),
        *("local.num_ranks=1", "local.num_actors=1", "local.actor.vllm.max_model_len=128", "rollout.max_tokens=4"),
        *("trainer.batch_prompts=4", "trainer.total_steps=3", "local.actor.vllm.enforce_eager=true"),
    )
    assert launched.exit_code(START_S) == 0, launched.said()
    (run_dir,) = run_dirs(tmp_path / "runs")
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 3
    assert len(set(trained(run_dir))) == 12


def check_export(export: Path, source: Path) -> None:
    """Plain transformers loads it; its weights have the names of the checkpoint before, and are trained."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    before, after = load_file(source / "model.safetensors"), load_file(export / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    model, info = AutoModelForImageTextToText.from_pretrained(export, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(t.numel() for t in after.values())
    assert AutoProcessor.from_pretrained(export).image_token == "<|image_pad|>"


def check_stops(launched: Launched, *also: Launched) -> None:
    """Ctrl-C ends every process within 5 s, with exit code 130."""
    launched.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 5
    while any(one.left() for one in (launched, *also)):
        assert time.monotonic() < deadline, [one.left() for one in (launched, *also)]
        time.sleep(0.05)
    assert launched.exit_code(1) == 130
    assert launched.stderr.strip().splitlines()[-1].startswith("outrider: stopped")
