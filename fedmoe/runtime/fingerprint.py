"""The fingerprint of a certificate: SHA-256 of its public key, which stays the same when the certificate is renewed."""

from __future__ import annotations

import hashlib

#: How a fingerprint is written: 64 hexadecimal digits.
FINGERPRINT = r"[0-9a-f]{64}"


def key_fingerprint(certificate: bytes) -> str:
    """The fingerprint of a certificate (DER): SHA-256 of its SubjectPublicKeyInfo; ValueError for what is none."""
    # Only those who pin a key pay for this library.
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = x509.load_der_x509_certificate(certificate).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
