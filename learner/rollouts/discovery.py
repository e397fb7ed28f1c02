"""Where actors may be: fixed addresses, and DNS names that are resolved again and again.

A target is "host:port", one actor, or "dns:///name:port", one actor at each address of the name (the form of gRPC's own
names): a headless Service of Kubernetes answers with the addresses of its pods, so that scaling the Deployment scales
the fleet.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence

from common.config import ConfigError
from common.log import get_logger
from common.rpc.server import join_address, split_address

log = get_logger("learner.rollouts.discovery")

SCHEME = "dns:///"
_TIMEOUT_S = 5.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class Discovery:
    """The addresses that `targets` stand for now.

    Args:
        targets: as above. Raises `ConfigError` for none, for one given twice, and for a malformed name.
        resolve: host and port to IP addresses; raises `OSError`. The system's resolver by default.
    """

    def __init__(self, targets: Sequence[str], resolve: "Resolve | None" = None) -> None:
        if not targets:
            raise ConfigError("no actor addresses; give at least one host:port")
        if len(set(targets)) != len(targets):
            raise ConfigError(f"an actor address is given twice: {', '.join(targets)}")
        self.fixed = tuple(target for target in targets if not target.startswith(SCHEME))
        names = [_split_name(target.removeprefix(SCHEME)) for target in targets if target.startswith(SCHEME)]
        self._resolve = resolve or _ask_resolver
        self._known: dict[tuple[str, int], tuple[str, ...]] = dict.fromkeys(names, ())

    @property
    def changes(self) -> bool:
        """Whether the addresses may change at all."""
        return bool(self._known)

    async def addresses(self) -> tuple[str, ...]:
        """All addresses, the fixed ones first. A name that cannot be looked up keeps what it had."""
        for (host, port), before in self._known.items():
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    found = await self._resolve(host, port)
            except socket.gaierror as error:
                if error.errno not in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
                    log.warning("name cannot be resolved now", name=host, error=str(error))
                    continue
                found = ()  # it has no address: no pod is there
            except (OSError, TimeoutError) as error:
                log.warning("name cannot be resolved now", name=host, error=str(error))
                continue
            now = tuple(sorted(join_address(address, port) for address in found))
            if now != before:
                log.info("name resolved", name=host, addresses=now)
            self._known[host, port] = now
        resolved = (address for addresses in self._known.values() for address in addresses)
        return tuple(dict.fromkeys((*self.fixed, *resolved)))


def _split_name(address: str) -> tuple[str, int]:
    host, port = split_address(address)
    try:
        host.encode("idna")  # as the resolver will
    except UnicodeError as error:
        raise ConfigError(f"{host!r} is not a name: {error}") from None
    return host, port


async def _ask_resolver(host: str, port: int) -> Sequence[str]:
    answers = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in answers))
