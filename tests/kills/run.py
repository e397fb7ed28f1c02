"""One run under fire: the learner's own loop (`benchmarks/simulated.py`) over actors that are killed all along."""

import io
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from PIL import Image

from actor.config import FakeConfig
from benchmarks.simulated import make_prompts, train
from learner.types import Group
from tests.kills.actors import actors_at, served_versions
from tests.kills.books import AGAIN, Books, Broken
from tests.kills.killer import Killer
from tests.launched import free_ports

# A group takes half a second, a step too: most of the time, most actors are in the middle of some.
ENGINE = {"mean_tokens": 24, "first_token_s": 0.1, "token_s": 0.01}
STEP_S = 0.5
BATCH, GROUP_SIZE, MAX_TOKENS, MAX_STALENESS, SLOTS_PER_ACTOR = 16, 4, 40, 1, 4
NUM_ROWS, NUM_IMAGES = 500, 8
# Steps after the one in which the last actor is killed.
PEACE = 4
# Without a step. Nothing of what the learner waits for takes so long.
_STALLED_S = 180
_TELL_S = 10.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a run in which everything held."""

    num_kills: int
    num_trained: int
    """Groups."""
    dropped: dict[str, int]
    """Groups, by reason."""
    retries: dict[str, int]
    """Groups that were sampled again, by reason."""
    seconds: float
    longest_gap_s: float
    """Between two steps."""


def run(num_kills: int, num_actors: int, seed: int, folder: Path) -> Outcome:
    """Raises Broken, or ActorEnded. The logs of all are in `folder` afterwards."""
    prompts = make_prompts(NUM_ROWS, [_image(i) for i in range(NUM_IMAGES)])
    books = Books(prompts, FakeConfig.model_validate(ENGINE), GROUP_SIZE, MAX_TOKENS, BATCH, MAX_STALENESS)
    base = free_ports(num_actors)
    addresses = [f"127.0.0.1:{base + i}" for i in range(num_actors)]
    told_at = time.monotonic()
    signal.signal(signal.SIGALRM, _stalled)
    signal.alarm(_STALLED_S)
    try:
        with (
            actors_at(addresses, folder, [f"fake.{name}={value}" for name, value in ENGINE.items()]) as actors,
            Killer(actors, num_kills, within_s=STEP_S, seed=seed) as killer,
        ):

            def on_step(version: int, groups: Sequence[Group]) -> None:
                nonlocal told_at
                signal.alarm(_STALLED_S)
                books.check_step(version, groups)
                killer.step()
                if time.monotonic() - told_at >= _TELL_S:
                    told_at = time.monotonic()
                    print(f"{killer.num_begun} of {num_kills} kills, {books.num_trained} groups trained", flush=True)

            done = train(
                folder / "run",
                prompts,
                STEP_S,
                on_step,
                rollout={
                    "actors": addresses,
                    "min_actors": num_actors,
                    "n": GROUP_SIZE,
                    "max_tokens": MAX_TOKENS,
                    "slots_per_actor": SLOTS_PER_ACTOR,
                },
                trainer={
                    "batch_prompts": BATCH,
                    "total_steps": num_kills + PEACE,
                    "max_staleness": MAX_STALENESS,
                },
                reward={"functions": ["tests.reward_functions:length_or_none"]},
            )
    finally:
        signal.alarm(0)
    books.check_end(done, served_versions(folder))
    last = done.steps[-1]
    return Outcome(
        num_kills=killer.num_begun,
        num_trained=books.num_trained,
        dropped={reason: len(sequences) for reason, sequences in done.ledger.dropped.items()},
        retries=last["groups_resent"] | {AGAIN: last["groups_dropped"].get(AGAIN, 0)},
        seconds=done.seconds,
        longest_gap_s=max(step["step_s"] for step in done.steps[1:]),
    )


def _stalled(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Broken(f"no step within {_STALLED_S} s")


def _image(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()
