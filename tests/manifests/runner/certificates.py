"""What cert-manager does with the `Certificate`s of a namespace: a secret for each, from one authority."""

import datetime as dt
import re

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.manifests.rendered import Manifest

_USAGES = {"server auth": ExtendedKeyUsageOID.SERVER_AUTH, "client auth": ExtendedKeyUsageOID.CLIENT_AUTH}


class CertManager:
    """The authority's key is made at the start and stays; every `issue` makes a new key and certificate."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "outrider")])
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        self._certificate = self._sign(self._name, self._key.public_key(), dt.timedelta(days=1), constraints)

    def issue(self, certificate: Manifest) -> dict[str, bytes]:
        """The files of the secret that a `Certificate` asks for."""
        spec = certificate["spec"]
        if (spec["privateKey"]["algorithm"], spec["privateKey"]["size"]) != ("ECDSA", 256):
            raise NotImplementedError(f"private key {spec['privateKey']}")
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._sign(
            x509.Name([]),
            key.public_key(),
            parse_duration(spec["duration"]),
            x509.SubjectAlternativeName([x509.DNSName(name) for name in spec["dnsNames"]]),
            x509.ExtendedKeyUsage([_USAGES[usage] for usage in spec["usages"]]),
        )
        pem, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
        return {
            "tls.crt": leaf.public_bytes(pem),
            "tls.key": key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_password),
            "ca.crt": self._certificate.public_bytes(pem),
        }

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        duration: dt.timedelta,
        *extensions: x509.ExtensionType,
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateBuilder(self._name, subject, key, x509.random_serial_number())
        builder = builder.not_valid_before(now - dt.timedelta(minutes=1)).not_valid_after(now + duration)
        for extension in extensions:
            builder = builder.add_extension(extension, critical=not subject)
        return builder.sign(self._key, hashes.SHA256())


def parse_duration(text: str) -> dt.timedelta:
    """Of hours, as cert-manager's fields have it.

    Example: "720h" is 30 days.
    """
    found = re.fullmatch(r"(\d+)h", text)
    if found is None:
        raise NotImplementedError(f"duration {text}")
    return dt.timedelta(hours=int(found[1]))
