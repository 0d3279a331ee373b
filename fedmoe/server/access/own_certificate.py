"""The coordinator's own key and self-signed certificate: made once, kept, renewed with the same key before it ends."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from fedmoe.runtime.addresses import machine_names
from fedmoe.runtime.errors import ExpectedError
from fedmoe.runtime.files import write_atomic
from fedmoe.runtime.fingerprint import key_fingerprint

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate

_log = structlog.get_logger("fedmoe.coordinator")

#: Browsers refuse longer ones; who pins the key does not look at the end.
VALID = timedelta(days=730)
RENEWED_BEFORE = timedelta(days=365)
# Clocks of other machines may be behind.
_BACKDATED = timedelta(days=1)


class CertificateError(ExpectedError):
    """The kept key or certificate cannot be used; nothing is put in its place."""


@dataclass(frozen=True, slots=True)
class OwnCertificate:
    """Where key and certificate lie (PEM), and the fingerprint that a renewal does not change."""

    key: Path
    certificate: Path
    fingerprint: str


def own_certificate(folder: Path, names: Sequence[str], now: datetime) -> OwnCertificate:
    """The key and certificate in `folder`, made or renewed where that is due, for these host names and addresses.

    Raises `CertificateError` for files that cannot be used.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    folder.mkdir(mode=0o700, exist_ok=True)
    key_file, file = folder / "key.pem", folder / "certificate.pem"
    if key_file.exists():
        key = _kept_key(key_file)
    elif file.exists():
        raise CertificateError(f"{file} is there, but its key {key_file} is gone; {_way_out(folder)}")
    else:
        key = _new_key()
        write_atomic(key_file, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    certificate = _kept_certificate(file, key) if file.exists() else None
    reason = _renewal(certificate, names, now)
    if certificate is None or reason:
        certificate = _signed(key, names, now)
        write_atomic(file, certificate.public_bytes(Encoding.PEM))
        _log.info("certificate_made", file=str(file), names=list(names), reason=reason)
    return OwnCertificate(key_file, file, key_fingerprint(certificate.public_bytes(Encoding.DER)))


def _way_out(folder: Path) -> str:
    return (
        f"restore it from a backup, or move {folder} away: then a new key is made, and every worker that pinned "
        "the old one needs a new join line"
    )


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _kept_key(file: Path) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise CertificateError(f"{file} is no readable private key; {_way_out(file.parent)}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{file} holds no key on an elliptic curve; give it with --tls-cert and --tls-key")
    if file.stat().st_mode & 0o077:
        _log.warning("key_readable_by_others", file=str(file), fix=f"chmod 600 {file}")
    return key


def _kept_certificate(file: Path, key: EllipticCurvePrivateKey) -> Certificate:
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CertificateError(f"{file} is no readable certificate; {_way_out(file.parent)}") from error
    if certificate.public_key() != key.public_key():
        raise CertificateError(f"{file} is of another key than {file.with_name('key.pem')}; {_way_out(file.parent)}")
    return certificate


def _renewal(certificate: Certificate | None, names: Iterable[str], now: datetime) -> str:
    """Why a certificate has to be made; empty where the kept one will do."""
    if certificate is None:
        return "there was none"
    if certificate.not_valid_after_utc - now < RENEWED_BEFORE:
        return f"the one before ends on {certificate.not_valid_after_utc:%Y-%m-%d}"
    from cryptography import x509

    kept = set(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    lacking = [name for name in names if _general_name(name) not in kept]
    return f"this machine has new names: {', '.join(lacking)}" if lacking else ""


def _general_name(name: str) -> object:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _signed(key: EllipticCurvePrivateKey, names: Iterable[str], now: datetime) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedMoE coordinator")])
    known = [_general_name(name) for name in names]
    alternatives = x509.SubjectAlternativeName([name for name in known if isinstance(name, x509.GeneralName)])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).add_extension(alternatives, critical=False)
    builder = builder.not_valid_before(now - _BACKDATED).not_valid_after(now + VALID)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    return builder.add_extension(usage, critical=False).sign(key, hashes.SHA256())


def certificate_now(folder: Path, host: str) -> OwnCertificate:
    """`own_certificate` for this machine and this time."""
    return own_certificate(folder, machine_names(host), datetime.now(UTC))
