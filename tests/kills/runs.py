"""The runs of `python -m tests.kills`."""

from pathlib import Path

from tests.helpers.launched import free_ports
from tests.kills.killer import Killer
from tests.kills.run import Load, Outcome, run
from tests.kills.scripts import RollingRestart, Scaling
from tests.kills.stopping import NUM_STEPS, Stopping

# Steps after the one in which the last actor is killed.
PEACE = 4
SIZES = (1, 64, 3, 32)
# Steps that the scripts have time for.
_ROLLING_STEPS, _SCALING_STEPS = 60, 100


def kills(folder: Path, num_actors: int, num_kills: int, seed: int) -> Outcome:
    """One for each step."""
    within_s = Load().step_s
    return run(
        folder,
        _addresses(num_actors),
        num_kills + PEACE,
        lambda actors: Killer(actors, num_kills, within_s=within_s, seed=seed),
    )


def rolling(folder: Path, num_actors: int) -> Outcome:
    """All of them restarted, one after the other. The actors are what a step waits for."""
    return run(folder, _addresses(num_actors), _ROLLING_STEPS, RollingRestart, load=Load(step_s=0.0))


def stopping(folder: Path) -> Outcome:
    """One of three stopped. The actors are what a step waits for: it takes two of them four to five seconds."""
    load = Load(engine={"mean_tokens": 24, "first_token_s": 0.5, "token_s": 0.05}, step_s=0.0)
    return run(folder, _addresses(3), NUM_STEPS, Stopping, load=load, min_actors=2)


def scaling(folder: Path) -> Outcome:
    """By DNS: the actors have one port, and each an address of its own."""
    port = free_ports(1)
    return run(
        folder,
        [f"127.1.0.{1 + i}:{port}" for i in range(max(SIZES))],
        _SCALING_STEPS,
        lambda actors: Scaling(actors, SIZES),
        load=Load(step_s=0.0, batch=128, slots_per_actor=16),
        min_actors=SIZES[0],
        targets=[f"dns:///actors.test:{port}"],
    )


def _addresses(num_actors: int) -> list[str]:
    base = free_ports(num_actors)
    return [f"127.0.0.1:{base + i}" for i in range(num_actors)]
