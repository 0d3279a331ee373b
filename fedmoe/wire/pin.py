"""Coordinator URLs with a fingerprint, https://HOST:PORT#FINGERPRINT: connections that accept that public key only.

Neither authorities, names nor dates count then: whoever has the private key is the coordinator.
"""

from __future__ import annotations

import re
import ssl

from fedmoe.runtime.fingerprint import FINGERPRINT, key_fingerprint


class FingerprintError(ValueError):
    """What stands behind the # of a URL is no fingerprint, or can mean nothing there."""


class OtherKeyError(Exception):
    """A server has another key than the pinned one; nothing was sent to it."""


class PinnedContext(ssl.SSLContext):
    """TLS settings of a client that trusts one public key; `check` has to be called after the handshake."""

    fingerprint: str

    @classmethod
    def of(cls, fingerprint: str) -> PinnedContext:
        context = cls(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.fingerprint = fingerprint
        return context

    def check(self, certificate: bytes | None) -> None:
        """Raise `OtherKeyError` unless the certificate (DER), whose key the peer proved to own, is of that key."""
        try:
            got = key_fingerprint(certificate or b"")
        except ValueError:
            got = "no certificate that can be read"
        if got != self.fingerprint:
            raise OtherKeyError(
                f"the key there is another one than the pinned one, so nothing was sent (expected {self.fingerprint}, "
                f"got {got}): check the address; ask the coordinator's operator for the fingerprint, or for a new join "
                "line if it was set up anew. If the key should be the pinned one, somebody may stand in between"
            )


def split_pin(url: str) -> tuple[str, str | None]:
    """A coordinator's URL without its fingerprint, and the fingerprint; raises `FingerprintError`."""
    address, mark, fingerprint = url.partition("#")
    if not mark:
        return url, None
    if not address.lower().startswith("https://"):
        raise FingerprintError("a fingerprint is of TLS: write https:// before the host, or leave #FINGERPRINT out")
    if not re.fullmatch(FINGERPRINT, fingerprint.lower()):
        raise FingerprintError(
            "what stands behind # in the coordinator's URL is no fingerprint, which has 64 digits 0-9 and a-f; copy it "
            "from the coordinator's join line, or leave it out"
        )
    return address.rstrip("/"), fingerprint.lower()


def join_line(token: str, url: str, fingerprint: str | None) -> str:
    """The line for `fedmoe join`, TOKEN@HOST:PORT#FINGERPRINT, for a token and a coordinator's URL."""
    return f"{token}@{url.removeprefix('https://')}" + (f"#{fingerprint}" if fingerprint else "")
