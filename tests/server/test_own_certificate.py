"""The coordinator's own certificate: made once, kept, renewed with the same key, never put in the place of another."""

from __future__ import annotations

import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedmoe.runtime.fingerprint import key_fingerprint
from fedmoe.server.access.own_certificate import RENEWED_BEFORE, VALID, CertificateError, own_certificate

NAMES = ["127.0.0.1", "fd00::2", "host-1"]
NOW = datetime(2026, 12, 1, tzinfo=UTC)


def test_key_and_certificate_are_made_once_and_only_for_their_owner(tmp_path: Path) -> None:
    made = own_certificate(tmp_path / "tls", NAMES, NOW)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "tls", made.key)] == [0o700, 0o600]
    kept = [path.read_bytes() for path in (made.key, made.certificate)]
    assert own_certificate(tmp_path / "tls", NAMES[1:], NOW) == made
    assert [path.read_bytes() for path in (made.key, made.certificate)] == kept
    der = ssl.PEM_cert_to_DER_cert(made.certificate.read_text())
    assert key_fingerprint(der) == made.fingerprint
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(made.certificate, made.key)


@pytest.mark.parametrize(
    ("later", "names"), [(VALID - RENEWED_BEFORE + timedelta(days=1), NAMES), (timedelta(0), [*NAMES, "192.0.2.7"])]
)
def test_before_its_end_and_for_new_names_it_is_renewed_with_the_same_key(
    tmp_path: Path, later: timedelta, names: list[str]
) -> None:
    made = own_certificate(tmp_path / "tls", NAMES, NOW)
    key, before = made.key.read_bytes(), made.certificate.read_bytes()
    renewed = own_certificate(tmp_path / "tls", names, NOW + later)
    assert renewed.fingerprint == made.fingerprint
    assert (made.key.read_bytes(), made.certificate.read_bytes() != before) == (key, True)


def test_after_a_crash_between_key_and_certificate_the_key_is_taken(tmp_path: Path) -> None:
    made = own_certificate(tmp_path / "tls", NAMES, NOW)
    made.certificate.unlink()
    assert own_certificate(tmp_path / "tls", NAMES, NOW).fingerprint == made.fingerprint


@pytest.mark.parametrize("damaged", ["key.pem", "certificate.pem"])
def test_what_cannot_be_read_is_never_replaced(tmp_path: Path, damaged: str) -> None:
    folder = tmp_path / "tls"
    own_certificate(folder, NAMES, NOW)
    (folder / damaged).write_text("damaged")
    with pytest.raises(CertificateError, match=f"{damaged} is no readable"):
        own_certificate(folder, NAMES, NOW)
    assert (folder / damaged).read_text() == "damaged"


def test_a_certificate_without_its_key_or_of_another_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    own_certificate(folder, NAMES, NOW)
    other = own_certificate(tmp_path / "other", NAMES, NOW)
    key = (folder / "key.pem").read_bytes()
    (folder / "key.pem").write_bytes(other.key.read_bytes())
    with pytest.raises(CertificateError, match="is of another key"):
        own_certificate(folder, NAMES, NOW)
    (folder / "key.pem").unlink()
    with pytest.raises(CertificateError, match=r"its key .* is gone; restore it"):
        own_certificate(folder, NAMES, NOW)
    (folder / "key.pem").write_bytes(key)
    own_certificate(folder, NAMES, NOW)
