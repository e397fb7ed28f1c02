"""Whether a run keeps to what its actors take: one that never can ends at its start, not with the first batch.

`outrider` looks at `local.actor` before it starts anything, the learner at what the first actors say of themselves.
"""

import sys
from collections.abc import Sequence

from common.config import ConfigError
from common.errors import OutriderError
from common.log import get_logger
from common.types import ActorState, ServerLimits
from learner.config import LearnerConfig
from learner.rollouts.members import Member

log = get_logger(__name__)


def check_limits(config: LearnerConfig, limits: ServerLimits, whose: str) -> None:
    """Raises ConfigError, with both keys, for a group that no prompt and no image makes small enough."""
    n, max_tokens, samples = config.rollout.n, config.rollout.max_tokens, config.evaluation.samples
    for key, value, limit_key, limit in (
        ("rollout.max_tokens", max_tokens, "vllm.max_model_len", limits.max_context_tokens),
        ("rollout.n", n, "limits.max_group_size", limits.max_group_size),
        ("evaluation.samples", samples, "limits.max_group_size", limits.max_group_size),
    ):
        if value > limit:
            raise ConfigError(
                f"{key} is {value}, but {limit_key} of {whose} is {limit}; lower the one or raise the other"
            )


def check_local_limits(config: LearnerConfig) -> None:
    """As far as `local.actor` says them, which has been validated. Raises ConfigError as `check_limits`."""
    actor = config.local.actor
    if not config.local.num_actors or actor.get("engine", "vllm") != "vllm":
        return
    limits = ServerLimits(
        max_context_tokens=int(actor.get("vllm", {}).get("max_model_len") or sys.maxsize),  # None: the model's own
        max_group_size=int(actor.get("limits", {}).get("max_group_size", ServerLimits().max_group_size)),
    )
    check_limits(config, limits, "local.actor")


async def check_actors_limits(config: LearnerConfig, members: Sequence[Member]) -> None:
    """Of those that answer and stay. Raises ConfigError as `check_limits`."""
    for member in members:
        if not member.reachable or member.state in (ActorState.DRAINING, ActorState.FAILED):
            continue
        try:
            info = await member.client.server_info()
        except OutriderError as error:  # it has gone again; the fleet sees to that
            log.warning("an actor did not say its limits", address=member.address, error=error.message)
        else:
            check_limits(config, info.limits, f"actor {member.address}")
