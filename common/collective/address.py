"""How the other members reach this machine."""

import socket


def address_towards(host: str, port: int) -> str:
    """This machine's own address on the route to `host`: the one that the other members can reach."""
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, proto) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
