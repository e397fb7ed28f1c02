"""Certificates for tests of TLS, and the methods that they open or close."""

import os
from pathlib import Path
from typing import Any

import trustme
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from common.pb.admin.v1 import admin_pb2
from common.pb.rollout.v1 import rollout_pb2
from common.pb.weights.v1 import weights_pb2

OURS = {
    method.full_name: method
    for file in (rollout_pb2, weights_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# Health and reflection; the Python server does not have grpc.health.v1.Health/List.
PUBLIC = {
    method.full_name: method
    for file in (health_pb2, reflection_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if method.name != "List"
}


class Authority:
    """A CA, and the directories of certificates that it gives out."""

    def __init__(self, directory: Path) -> None:
        self.ca = trustme.CA()
        self._directory = directory

    def directory(self, *names: str, place: str | None = None, **options: Any) -> Path:
        """A directory for the holder of these names; written anew where there is one."""
        directory = self._directory / (place or names[0])
        directory.mkdir(parents=True, exist_ok=True)
        leaf = self.ca.issue_cert(*names, **options)
        for name, blob in (
            ("tls.key", leaf.private_key_pem),
            ("tls.crt", leaf.cert_chain_pems[0]),
            ("ca.crt", self.ca.cert_pem),
        ):
            partial = directory / f".{name}"
            blob.write_to_path(str(partial))
            os.replace(partial, directory / name)  # noqa: PTH105 - as short as it gets
        return directory
