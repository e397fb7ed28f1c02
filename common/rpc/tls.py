"""Mutual TLS: both ends show a certificate of one CA, and what a caller may do is written in its certificate.

A directory has the three files as cert-manager mounts them: `tls.crt`, `tls.key` and `ca.crt`. A certificate names its
holder's role as a DNS name, `<role>.outrider`:

    learner.outrider   every call
    reader.outrider    questions and status: nothing that changes weights or state
    actor.outrider     a server; calls none of these

Health and reflection answer whoever has a certificate of the CA.

Clients look for `actor.outrider` in a server's certificate, whatever the address: pods are called by address. The files
are read again when they change, so certificates rotate under running processes.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from common.config import ConfigError
from common.errors import PermissionDenied
from common.log import get_logger

log = get_logger(__name__)

LEARNER, READER, ACTOR = (f"{role}.outrider" for role in ("learner", "reader", "actor"))

# What a reader may call, too.
_READ = frozenset(
    {
        "/rollout.v1.RolloutService/Generate",
        "/rollout.v1.RolloutService/GetServerInfo",
        "/rollout.v1.RolloutService/PutMedia",
        "/weights.v1.WeightService/GetStatus",
    }
)
_FILES = ("tls.crt", "tls.key", "ca.crt")


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM bytes. `stamp` is another one when a file has changed."""

    certificate: bytes
    key: bytes
    ca: bytes
    stamp: tuple[int, ...]


def read_certificates(directory: Path) -> Certificates:
    """Raises ConfigError for files that are missing, or that do not belong together."""
    certificate, key, ca = (directory / name for name in _FILES)
    stamp = stamp_of(directory)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(ca)
        return Certificates(certificate.read_bytes(), key.read_bytes(), ca.read_bytes(), stamp)
    except FileNotFoundError:
        missing = next((name for name in _FILES if not (directory / name).is_file()), _FILES[0])
        raise ConfigError(f"tls: {directory} has no {missing}; it needs {', '.join(_FILES)}") from None
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"tls: the files of {directory} cannot be used: {error}") from None


def stamp_of(directory: Path) -> tuple[int, ...]:
    """Changes with the files."""
    stamps = []
    for name in _FILES:
        try:
            status = (directory / name).stat()
        except OSError:
            continue  # said where they are read
        stamps += [status.st_ino, status.st_mtime_ns]
    return tuple(stamps)


def server_credentials(directory: Path) -> grpc.ServerCredentials:
    """For a server that asks every client for a certificate. Raises ConfigError."""
    current = read_certificates(directory)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """At each handshake: None while nothing has changed."""
        nonlocal current
        if stamp_of(directory) == current.stamp:
            return None
        try:
            current = read_certificates(directory)
        except ConfigError as error:  # in the middle of a rotation, perhaps: what there was goes on
            log.warning("certificates were not renewed", error=str(error))
            return None
        log.info("certificates renewed", directory=str(directory))
        return configuration(current)

    def configuration(files: Certificates) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(files.key, files.certificate)], files.ca)

    fetcher: Any = renewed  # the stubs forget that it may return None
    return grpc.dynamic_ssl_server_credentials(configuration(current), fetcher, require_client_authentication=True)


def channel_credentials(files: Certificates) -> grpc.ChannelCredentials:
    """For a client."""
    return grpc.ssl_channel_credentials(files.ca, files.key, files.certificate)


def authorize(method: str, names: frozenset[str]) -> None:
    """Raise PermissionDenied unless a certificate with these DNS names may call `method`, "/package.Service/Method"."""
    if LEARNER in names or (READER in names and method in _READ):
        return
    needed = f"{LEARNER} or {READER}" if method in _READ else LEARNER
    shown = ", ".join(sorted(names)) or "none"
    raise PermissionDenied(f"{method} needs a certificate with the name {needed}; the caller's names are {shown}")
