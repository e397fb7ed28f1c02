"""`rollout`: how groups are sampled, and by whom."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from common.config import Config
from common.rpc.options import DEFAULT_MAX_MESSAGE_BYTES
from common.types import MAX_STRING_CHARS, MAX_STRINGS, MAX_TOKEN_IDS


class RolloutConfig(Config):
    """How groups are sampled, and by whom."""

    actors: tuple[str, ...] = ()
    """Where the actors are: "host:port" of each, or "dns:///name:port" for one at each address of the name, which is
    looked up again and again: the form for names whose address changes. The single-machine launcher fills it in."""
    tls: Path | None = None
    """Directory with tls.crt, tls.key and ca.crt: mutual TLS with the actors (common/rpc/tls.py). None: plaintext."""
    max_message_bytes: int = Field(DEFAULT_MAX_MESSAGE_BYTES, ge=2**21, lt=2**31)
    """Of one message to or from an actor: at least the largest limits.max_message_bytes of the actors."""
    n: int = Field(8, ge=2)
    """Completions of one prompt. Advantages compare them with each other, so there are at least two."""
    temperature: float = Field(1.0, ge=0.01, le=2)
    """Of the sampling; its bounds are as far as actors sample."""
    max_tokens: int = Field(256, ge=1)
    """Of one completion, which is cut off there."""
    stop: tuple[Annotated[str, Field(min_length=1, max_length=MAX_STRING_CHARS)], ...] = Field(
        (), max_length=MAX_STRINGS
    )
    """Strings that end a completion, which they belong to: the reward sees them, and their tokens are trained."""
    on_update: Literal["continue", "restart"] = "continue"
    """What becomes of a group that is under way when its actor gets new weights. "continue": it goes on under them, and
    its version spans say which token is whose. "restart": it is broken off and sampled again from its prompt, so that
    all of it is of one version; a group that this has happened to three times goes on."""
    allowed_token_ids: tuple[int, ...] = Field((), max_length=MAX_TOKEN_IDS)
    """Restrict sampling to these ids; empty: all."""
    drop_uniform_groups: bool = False
    """Sample another group in place of one whose rewards are all equal (dynamic sampling)."""
    seed: int | None = Field(None, ge=0, lt=2**30)
    """Seed of the sampling; None leaves it to the actors."""
    group_timeout_s: float = Field(300.0, gt=0)
    """A group that takes longer on one actor is sent to another."""
    hung_s: float | None = Field(None, gt=0)
    """An actor that works on groups of which nothing comes for so long, while another actor gets on, is taken for hung:
    its groups are sent to others. None: a third of group_timeout_s."""
    slots_per_actor: int = Field(64, ge=1)
    """Groups that one actor works on at once."""
    startup_timeout_s: float = Field(300.0, gt=0)
    """How long to wait until min_actors answer."""
    min_actors: int = Field(1, ge=1)
    """Actors that must have answered before the run begins."""
