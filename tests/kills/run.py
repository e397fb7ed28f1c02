"""One run in trouble: the learner's own loop (`benchmarks/simulated.py`) over actors that something happens to."""

import io
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol, Self

from PIL import Image

from actor.config import FakeConfig
from benchmarks.simulated import make_prompts, train
from learner.types import Group
from tests.kills.actors import Actor, actors_at, served_versions
from tests.kills.books import AGAIN, Books, Broken

GROUP_SIZE, MAX_TOKENS, MAX_STALENESS = 4, 40, 1
NUM_ROWS, NUM_IMAGES = 500, 8
# Without a step. Nothing of what the learner waits for takes so long.
_STALLED_S = 180
_TELL_S = 10.0


class Trouble(AbstractContextManager["Trouble"], Protocol):
    """What happens to the actors, which it starts. At its end nothing that it has begun is left to be done."""

    def __enter__(self) -> Self: ...

    def step(self, groups: Sequence[Group]) -> None:
        """A step has trained these. Raises ActorEnded, or Broken."""
        ...

    def told(self) -> str:
        """What has happened so far."""
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """By default a group takes half a second, a step too: most of the time, most actors are in the middle of some."""

    engine: Mapping[str, float] = field(
        default_factory=lambda: {"mean_tokens": 24, "first_token_s": 0.1, "token_s": 0.01}
    )
    step_s: float = 0.5
    batch: int = 16
    slots_per_actor: int = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a run in which everything held."""

    told: str
    """What has happened."""
    num_trained: int
    """Groups."""
    dropped: dict[str, int]
    """Groups, by reason."""
    retries: dict[str, int]
    """Groups that were sampled again, by reason."""
    seconds: float
    steps_s: tuple[float, ...]
    """Of each step but the first, before which the actors get their weights."""


def run(
    folder: Path,
    addresses: Sequence[str],
    num_steps: int,
    make_trouble: Callable[[Sequence[Actor]], Trouble],
    *,
    load: Load | None = None,
    min_actors: int | None = None,
    targets: Sequence[str] = (),
) -> Outcome:
    """Raises Broken, or ActorEnded. The logs of all are in `folder` afterwards.

    Args:
        folder: for the run, and for the logs.
        addresses: of the actors.
        num_steps: of the learner.
        make_trouble: what happens to the actors.
        load: how much work there is.
        min_actors: the learner waits for so many; None: for all.
        targets: where the learner looks for actors; by default at their addresses.
    """
    load = load or Load()
    prompts = make_prompts(NUM_ROWS, [_image(i) for i in range(NUM_IMAGES)])
    books = Books(prompts, FakeConfig.model_validate(load.engine), GROUP_SIZE, MAX_TOKENS, load.batch, MAX_STALENESS)
    told_at = time.monotonic()
    signal.signal(signal.SIGALRM, _stalled)
    signal.alarm(_STALLED_S)
    try:
        with (
            actors_at(addresses, folder, [f"fake.{name}={value}" for name, value in load.engine.items()]) as actors,
            make_trouble(actors) as trouble,
        ):

            def on_step(version: int, groups: Sequence[Group]) -> None:
                nonlocal told_at
                signal.alarm(_STALLED_S)
                books.check_step(version, groups)
                trouble.step(groups)
                if time.monotonic() - told_at >= _TELL_S:
                    told_at = time.monotonic()
                    print(f"{trouble.told()}; {books.num_trained} groups trained", flush=True)

            done = train(
                folder / "run",
                prompts,
                load.step_s,
                on_step,
                rollout={
                    "actors": [*(targets or addresses)],
                    "min_actors": len(addresses) if min_actors is None else min_actors,
                    "n": GROUP_SIZE,
                    "max_tokens": MAX_TOKENS,
                    "slots_per_actor": load.slots_per_actor,
                },
                trainer={"batch_prompts": load.batch, "total_steps": num_steps, "max_staleness": MAX_STALENESS},
                reward={"functions": ["tests.helpers.reward_functions:length_or_none"]},
            )
    finally:
        signal.alarm(0)
    books.check_end(done, served_versions(folder))
    last = done.steps[-1]
    again = last["groups_dropped"].get(AGAIN, 0)
    return Outcome(
        told=trouble.told(),
        num_trained=books.num_trained,
        dropped={reason: len(sequences) for reason, sequences in done.ledger.dropped.items()},
        retries=last["groups_resent"] | ({AGAIN: again} if again else {}),
        seconds=done.seconds,
        steps_s=tuple(step["step_s"] for step in done.steps[1:]),
    )


def _stalled(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Broken(f"no step within {_STALLED_S} s")


def _image(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()
