"""NetworkPolicies as packet filter rules of one pod. What is decided is pure; `install` talks to nf_tables.

Rules stand in the pod's own network namespace, where the pod, without capabilities, cannot change them.
"""

import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Any

from tests.manifests.policies import matches
from tests.manifests.rendered import Manifest

_PROTOCOLS = {"TCP": 6, "UDP": 17}


@dataclass(frozen=True)
class Peer:
    """Somebody with an address: a pod, or what stands for one."""

    address: str
    labels: dict[str, str]
    namespace: str


@dataclass(frozen=True, order=True)
class Opening:
    """Who may come in or be called: an address at a range of ports.

    Example: Opening("10.244.0.7", 6, 50051, 50051) is TCP at port 50051 of that address.
    """

    address: str
    protocol: int
    first_port: int
    last_port: int


@dataclass(frozen=True)
class Rules:
    """What a pod may do. None: everything, for no policy of that direction selects it."""

    ingress: list[Opening] | None
    egress: list[Opening] | None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def decide(policies: Sequence[Manifest], pod: Peer, others: Sequence[Peer]) -> Rules:
    """The rules of `pod` among `others`."""
    mine = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace and matches(policy["spec"]["podSelector"], pod.labels)
    ]
    directions = []
    for kind, key, end in (("Ingress", "ingress", "from"), ("Egress", "egress", "to")):
        chosen = [policy for policy in mine if kind in policy["policyTypes"]]
        openings = {
            opening
            for policy in chosen
            for rule in policy.get(key, ())
            for peer in others
            if any(_is_meant(selector, peer, pod.namespace) for selector in rule[end])
            for opening in _openings(peer.address, rule["ports"])
        }
        directions.append(sorted(openings) if chosen else None)
    return Rules(*directions)


def _is_meant(selector: Manifest, peer: Peer, namespace: str) -> bool:
    if "namespaceSelector" in selector:
        if not matches(selector["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace}):
            return False
    elif peer.namespace != namespace:
        return False
    return matches(selector.get("podSelector", {}), peer.labels)


def _openings(address: str, ports: Sequence[Manifest]) -> list[Opening]:
    return [
        Opening(address, _PROTOCOLS[port["protocol"]], port["port"], port.get("endPort", port["port"]))
        for port in ports
    ]


# ----------------------------------------------------------------------------------------------------- nf_tables


def install(rules: Rules, node_address: str) -> None:
    """Replace the filters of this network namespace. Probes come from the node, which no policy shuts out."""
    from pyroute2.nftables.main import NFTables

    with NFTables(nfgen_family=2) as nft:
        nft.begin()
        nft.table("add", name="policy")
        nft.table("del", name="policy")
        nft.table("add", name="policy")
        for hook, openings, always in (("input", rules.ingress, [node_address]), ("output", rules.egress, [])):
            if openings is None:
                continue
            nft.chain("add", table="policy", name=hook, hook=hook, type="filter", policy=0)
            own = "iif" if hook == "input" else "oif"
            source = hook == "input"
            for expressions in (
                _established(),
                _loopback(own),
                *(_address(address, source=source) for address in always),
                *(_opening(opening, source=source) for opening in openings),
            ):
                nft.rule("add", table="policy", chain=hook, expressions=[[*expressions, _accept()]])
        nft.commit()


def _expression(name: str, **fields: Any) -> Any:
    from pyroute2.nftables.expressions import genex

    return genex(name, fields)


def _compare(data: bytes, operator: int = 0) -> Any:
    return _expression("cmp", sreg=1, op=operator, data={"attrs": [("NFTA_DATA_VALUE", data)]})


def _established() -> list[Any]:
    """Packets of connections that were let through: ct state established,related."""
    mask = {"attrs": [("NFTA_DATA_VALUE", struct.pack("=I", 2 | 4))]}
    zero = {"attrs": [("NFTA_DATA_VALUE", bytes(4))]}
    state = _expression("ct", dreg=1, key=0)
    return [state, _expression("bitwise", sreg=1, dreg=1, len=4, mask=mask, xor=zero), _compare(bytes(4), operator=1)]


def _loopback(direction: str) -> list[Any]:
    return [_expression("meta", key={"iif": 4, "oif": 5}[direction], dreg=1), _compare(struct.pack("=I", 1))]


def _address(address: str, *, source: bool) -> list[Any]:
    field = _expression("payload", dreg=1, base=1, offset=12 if source else 16, len=4)
    return [field, _compare(ip_address(address).packed)]


def _opening(opening: Opening, *, source: bool) -> list[Any]:
    protocol = [_expression("meta", key=16, dreg=1), _compare(bytes([opening.protocol]))]
    port = _expression("payload", dreg=1, base=2, offset=2, len=2)
    at_least = _compare(struct.pack("!H", opening.first_port), operator=5)
    at_most = _compare(struct.pack("!H", opening.last_port), operator=3)
    return [*_address(opening.address, source=source), *protocol, port, at_least, at_most]


def _accept() -> Any:
    verdict = {"attrs": [("NFTA_DATA_VERDICT", {"attrs": [("NFTA_VERDICT_CODE", 1)]})]}
    return _expression("immediate", dreg=0, data=verdict)
