"""`python -m learner.launcher.ask FILE`: whether actors that run already take what a run asks of them.

A process of its own, as gRPC and the processes that `--check` starts after it do not go together.
"""

import asyncio
import sys
from pathlib import Path

from common.client import GrpcClient
from common.config import ConfigError, load_config
from common.errors import OutriderError
from common.log import configure
from learner.config import LearnerConfig
from learner.rollouts.discovery import Discovery
from learner.rollouts.limits import check_limits


def main() -> int:
    """Print a line for each actor; the exit code is 2 for a mistake of the user, which is the last line."""
    configure("error", sys.stderr)
    try:
        asyncio.run(_ask(load_config(LearnerConfig, Path(sys.argv[1]), [])))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


async def _ask(config: LearnerConfig) -> None:
    """One that does not answer may come yet. Raises ConfigError."""
    for address in await Discovery(config.rollout.actors).addresses():
        client = GrpcClient(address, tls=config.rollout.tls)
        try:
            info = await client.server_info()
        except OutriderError as error:
            print(f"actor {address} does not answer now: {error.reason}: {error.message}")
        else:
            check_limits(config, info.limits, f"actor {address}")
            print(f"actor {address} answers")
        finally:
            await client.close()


if __name__ == "__main__":
    sys.exit(main())
