"""`local`: what the single-machine launcher starts."""

from typing import Any

from pydantic import Field

from common.config import Config


class LocalConfig(Config):
    """What the single-machine launcher (`outrider`) starts beside the learner. The learner itself does not read it."""

    num_actors: int = Field(2, ge=0)
    """Actors on this machine. 0: none, the run has those of rollout.actors."""
    num_ranks: int = Field(1, ge=1)
    """Ranks of the learner, each with a GPU of its own where there are any."""
    base_port: int = Field(50051, ge=1, le=65000)
    """Actor i listens on base_port + i."""
    actor: dict[str, Any] = Field(default_factory=dict)
    """Configuration of the actors, as in `python -m actor --config`; its keys are those of `actor/config.py`."""
