"""`python -m tests.helpers.reward_learner`: scores two groups with a reward that hangs, until it is stopped."""

import asyncio
import sys

from learner.rewards import RewardRunner
from tests.helpers.fakes import make_completion, make_sample


async def _score(rewards: RewardRunner) -> None:
    groups = (rewards.score(make_sample(row), [make_completion("g", 0, "a")]) for row in range(2))
    await asyncio.gather(*groups)


def main() -> int:
    rewards = RewardRunner(["tests.helpers.reward_functions:says_and_hangs"], decode=lambda _: "", timeout_s=600)
    print("started", flush=True)
    try:
        asyncio.run(_score(rewards))
    except KeyboardInterrupt:
        rewards.close()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
