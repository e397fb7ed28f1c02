"""What holds the namespaces that the containers of one pod share: network, hostname, shared memory.

Run by the runner as root: `python -m tests.manifests.runner.sandbox HOSTNAME`. It says that it is there, gets its
network card from the runner, then obeys lines of JSON: `{"up": "10.244.0.7/16", "gateway": ...}` or
`{"rules": ..., "node": ...}`.
"""

import json
import sys
from pathlib import Path

from tests.manifests.runner import kernel
from tests.manifests.runner.packet_filter import Opening, Rules, install

CARD = "eth0"


def main() -> None:
    """Until standard input ends."""
    kernel.die_with_parent()
    kernel.unshare(kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS | kernel.CLONE_NEWIPC)
    kernel.set_hostname(sys.argv[1])
    _answer()
    for line in sys.stdin:
        command = json.loads(line)
        if "up" in command:
            _configure(command["up"], command["gateway"])
        else:
            directions = (command["rules"]["ingress"], command["rules"]["egress"])
            openings = (None if found is None else [Opening(**opening) for opening in found] for found in directions)
            install(Rules(*openings), command["node"])
        _answer()


def _answer() -> None:
    print("done", flush=True)


def _configure(address: str, gateway: str) -> None:
    from pyroute2 import IPRoute

    # Addresses of version 6 would be outside of all policies.
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
    with IPRoute() as route:
        ip, _, prefix = address.partition("/")
        [loopback], [card] = route.link_lookup(ifname="lo"), route.link_lookup(ifname=CARD)
        route.link("set", index=loopback, state="up")
        route.addr("add", index=card, address=ip, prefixlen=int(prefix))
        route.link("set", index=card, state="up")
        route.route("add", dst="default", gateway=gateway)


if __name__ == "__main__":
    main()
