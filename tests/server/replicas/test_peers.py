"""What replicas pass on of a request, and which secrets and addresses they take."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmoe.server.replicas.ownership import Ownership, next_step, pause_before
from fedmoe.server.replicas.peers import PeerSecret, PeerSettingError, check_address, end_to_end


def test_headers_of_one_connection_and_of_replicas_are_not_passed_on() -> None:
    headers = [
        (b"Host", b"example"),
        (b"Connection", b"keep-alive, X-Mine"),
        (b"X-Mine", b"1"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Expect", b"100-continue"),
        (b"FedMoE-Replica-Secret", b"guess"),
        (b"Accept", b"a"),
        (b"Accept", b"b"),
    ]
    assert end_to_end(headers) == [(b"host", b"example"), (b"accept", b"a"), (b"accept", b"b")]
    assert end_to_end(headers, without=(b"accept",)) == [(b"host", b"example")]


@pytest.mark.parametrize("url", ["http://10.0.0.5:5000", "http://coordinator.example", "http://0.0.0.0:1"])
def test_an_address_off_this_machine_needs_tls(url: str) -> None:
    with pytest.raises(PeerSettingError, match="https"):
        check_address(url)
    check_address(url.replace("http:", "https:"))


def test_an_address_of_this_machine_needs_none() -> None:
    check_address("http://127.0.0.1:5000")
    check_address("http://localhost:5000")


@pytest.mark.parametrize("text", ["", "short", "two words that are longer than thirty-two characters", "ä" * 40])
def test_a_secret_that_is_no_secret_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "secret"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(PeerSettingError, match="replica-secret-file"):
        PeerSecret.read(file)


def test_a_secret_is_read_from_a_file_that_nobody_else_reads_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef" * 2 + "\n")
    file.chmod(0o644)
    with pytest.raises(PeerSettingError, match="chmod 600"):
        PeerSecret.read(file)
    file.chmod(0o600)
    secret = PeerSecret.read(file)
    assert secret.admits("0123456789abcdef" * 2)
    assert not secret.admits("0123456789abcdef")
    assert "0123" not in repr(secret)


def row(left: float) -> Ownership:
    return Ownership("federation", "a", "http://127.0.0.1:1", 3, left)


def test_a_duty_is_taken_when_it_is_free_by_who_may_own_it() -> None:
    assert next_step(None, may_own=True) == "take"
    assert next_step(row(0.0), may_own=True) == "take"
    assert next_step(row(-1.0), may_own=False) == "follow"
    assert next_step(row(0.1), may_own=True) == "follow"


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_a_replica_looks_again_after_a_third_of_a_lease_or_when_the_owners_ends(chance: float) -> None:
    assert 1.0 <= pause_before(None, 3.0, chance) <= 1.11
    assert 1.0 <= pause_before(row(2.9), 3.0, chance) <= 1.11
    assert 0.2 <= pause_before(row(0.2), 3.0, chance) <= 0.31
    assert 0.0 < pause_before(row(-5.0), 3.0, chance) <= 0.11
