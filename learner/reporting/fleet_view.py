"""`python -m learner fleet`: what each actor says of itself, as a table. Needs no learner, and disturbs none.

python -m learner fleet 127.0.0.1:50051 127.0.0.1:50052
python -m learner fleet dns:///outrider-actors:50051
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

_COLUMNS = ("address", "actor", "state", "version", "staged", "run", "epoch", "running", "waiting")
_TIMEOUT_S = 5.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m learner fleet", description="Show the state of actors.")
    parser.add_argument("targets", nargs="+", metavar="target", help='"host:port", or "dns:///name:port"')
    parser.add_argument("--tls", type=Path, metavar="DIR", help="directory with tls.crt, tls.key and ca.crt")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Print the table; the exit code is 1 if an actor does not answer, 2 for a mistake of the user."""
    options = parse(arguments)

    from common.config import ConfigError
    from common.log import configure

    configure("error", sys.stderr)
    try:
        rows = asyncio.run(_ask_all(options.targets, options.tls))
    except ConfigError as error:
        print(f"fleet: {error}", file=sys.stderr)
        return 2
    if not rows:
        print(f"fleet: no actor behind {', '.join(options.targets)}", file=sys.stderr)
        return 1
    whole = [_COLUMNS, *(row for row in rows if len(row) == len(_COLUMNS))]  # why one does not answer may be long
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    widths[0] = max(len(row[0]) for row in (_COLUMNS, *rows))
    for row in (_COLUMNS, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())
    return 0 if all(len(row) == len(_COLUMNS) for row in rows) else 1


async def _ask_all(targets: Sequence[str], tls: Path | None) -> list[tuple[str, ...]]:
    from learner.rollouts.discovery import Discovery

    return await asyncio.gather(*(_ask(address, tls) for address in await Discovery(targets).addresses()))


async def _ask(address: str, tls: Path | None) -> tuple[str, ...]:
    """One row of the table; a short one for an actor that does not answer."""
    from common.client import GrpcClient
    from common.errors import OutriderError

    client = GrpcClient(address, tls=tls)
    try:
        status = await client.status(timeout_s=_TIMEOUT_S)
    except OutriderError as error:
        return address, "-", f"no answer: {error.reason}: {error.message}"
    finally:
        await client.close()
    return (
        address,
        status.actor_id,
        status.state.value,
        str(status.policy_version),
        str(status.staged_version) if status.staged_version >= 0 else "-",
        status.run_id or "-",
        str(status.epoch) if status.epoch else "-",
        str(status.num_running),
        str(status.num_waiting),
    )
