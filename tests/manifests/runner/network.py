"""The node's network: a bridge with an address for each pod, one for DNS, one that stands for a cloud's metadata."""

import asyncio
import itertools
from pathlib import Path

from tests.manifests.runner.sandbox import CARD

_BRIDGE = "pods"
METADATA = "169.254.169.254"


class Network:
    """Of this process's network namespace, which must be new. No address is given twice; a card goes with its pod."""

    prefix = 16
    node = "10.244.0.1"
    name_server = "10.244.0.2"

    def __init__(self) -> None:
        self._numbers = itertools.count(10)
        self._cards = itertools.count()

    def set_up(self) -> None:
        """Make the bridge. Not inside an event loop: pyroute2 has one of its own."""
        from pyroute2 import IPRoute

        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
        with IPRoute() as route:
            [loopback] = route.link_lookup(ifname="lo")
            route.link("set", index=loopback, state="up")
            route.link("add", ifname=_BRIDGE, kind="bridge")
            [bridge] = route.link_lookup(ifname=_BRIDGE)
            for address in (self.node, self.name_server):
                route.addr("add", index=bridge, address=address, prefixlen=self.prefix)
            route.addr("add", index=bridge, address=METADATA, prefixlen=32)
            route.link("set", index=bridge, state="up")

    async def plug(self, pid: int) -> str:
        """Give the network namespace of this process a card on the bridge; the address that it is to have."""
        number = next(self._numbers)
        await asyncio.to_thread(self._plug, pid)
        return f"10.244.{number // 256}.{number % 256}"

    def _plug(self, pid: int) -> None:
        from pyroute2 import IPRoute

        name = f"veth{next(self._cards)}"
        with IPRoute() as route:
            route.link("add", ifname=name, kind="veth", peer={"ifname": CARD, "net_ns_pid": pid})
            [bridge], [card] = route.link_lookup(ifname=_BRIDGE), route.link_lookup(ifname=name)
            route.link("set", index=card, master=bridge, state="up")
