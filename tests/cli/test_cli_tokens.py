from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Outcome
from live import ADMIN, JOIN, LiveServer
from structlog.testing import capture_logs
from support import CoordinatorProcess

from fedmoe.cli import main
from fedmoe.cli.coordinator import check_tls
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient


@pytest.fixture
def token(locked_server: LiveServer, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `fedmoe token ...` as the administrator; what it printed."""

    def run(*arguments: str) -> str:
        main(["token", *arguments, "--coordinator-url", locked_server.url, "--token", ADMIN])
        return capsys.readouterr().out

    return run


def test_a_token_is_made_listed_by_its_label_and_revoked_by_the_beginning_of_its_hash(
    token: Callable[..., str], locked_server: LiveServer
) -> None:
    made = json.loads(
        token("create", "--worker", "w1", "--expert", "python", "--label", "site A", "--expires-in", "60", "--json")
    )
    with CoordinatorClient(locked_server.url, made["token"]) as client:
        client.federation()
    (found,) = [one for one in json.loads(token("list", "--json"))["tokens"] if one["label"] == "site A"]
    assert (found["hash"], found["worker"], found["experts"]) == (made["hash"], "w1", ["python"])
    assert found["used_at"] >= found["made_at"]
    shown = token("list")
    assert made["hash"][:8] in shown
    assert "site A" in shown
    assert made["token"] not in shown
    assert token("revoke", made["hash"][:8]) == "revoked\n"
    (found,) = [one for one in json.loads(token("list", "--json"))["tokens"] if one["label"] == "site A"]
    assert (found["revoked"], found["usable"]) == (True, False)
    with CoordinatorClient(locked_server.url, made["token"]) as client, pytest.raises(RefusedError, match="revoked"):
        client.federation()


@pytest.mark.parametrize("beginning", ["", "0000000000"])
def test_a_beginning_that_names_no_token_or_several_revokes_none(
    token: Callable[..., str], beginning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        token("revoke", beginning)
    assert "see 'fedmoe token list'" in capsys.readouterr().err
    assert not any(one["revoked"] for one in json.loads(token("list", "--json"))["tokens"])


def test_a_token_given_for_its_hash_is_not_shown(token: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        token("revoke", "fmt_secret")
    said = capsys.readouterr().err
    assert "'fedmoe token list' shows the hashes" in said
    assert "secret" not in said


def allowed(url: str, token: str | None) -> bool:
    try:
        with CoordinatorClient(url, token) as client:
            client.federation()
    except RefusedError:
        return False
    return True


def test_a_start_with_another_token_of_the_environment_ends_the_one_before(
    coordinator_process: Callable[..., CoordinatorProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "another-join-token-of-32-characters"
    monkeypatch.setenv("FEDMOE_ADMIN_TOKEN", ADMIN)
    monkeypatch.setenv("FEDMOE_TOKEN", JOIN)
    running = coordinator_process()
    running.start()
    assert [allowed(running.url, token) for token in (JOIN, other, ADMIN, None)] == [True, False, True, False]
    running.stop()
    monkeypatch.setenv("FEDMOE_TOKEN", other)
    running.start()
    assert [allowed(running.url, token) for token in (JOIN, other, ADMIN, None)] == [False, True, True, False]
    running.kill()
    monkeypatch.delenv("FEDMOE_TOKEN")
    monkeypatch.delenv("FEDMOE_ADMIN_TOKEN")
    running.start()
    assert [allowed(running.url, token) for token in (JOIN, other, ADMIN, None)] == [False, True, True, False]
    running.stop()
    running.arguments = ["--insecure"]
    running.log.unlink()
    running.start()
    assert allowed(running.url, None)
    said = running.log.read_text()
    assert f"WARNING: --insecure: none of the tokens of {running.state_dir} is asked for." in said
    assert '"event": "insecure"' in said


@pytest.mark.parametrize("variable", ["FEDMOE_TOKEN", "FEDMOE_ADMIN_TOKEN"])
def test_a_token_variable_that_is_set_but_empty_is_an_error_60(
    variable: str, fedmoe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, "")
    outcome = fedmoe("coordinator", "--state-dir", str(tmp_path / "state"))
    assert outcome.status == 2
    assert "unset the variable or the flag to use none" in outcome.err
    assert not (tmp_path / "state").exists()


def test_the_same_secret_for_both_roles_is_an_error(
    fedmoe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("FEDMOE_TOKEN", "FEDMOE_ADMIN_TOKEN"):
        monkeypatch.setenv(variable, JOIN)
    outcome = fedmoe("coordinator", "--state-dir", str(tmp_path / "state"))
    assert outcome.status == 2
    assert "every worker would be an administrator" in outcome.err
    assert JOIN not in outcome.err


@pytest.mark.parametrize(("mode", "told"), [(0o644, True), (0o640, True), (0o600, False)])
def test_a_key_that_others_may_read_is_told_with_what_to_do_60(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, told: bool
) -> None:
    key = tmp_path / "key.pem"
    key.write_text("secret")
    key.chmod(mode)
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", lambda *_: None)
    with capture_logs() as lines:
        check_tls(str(key), str(key))
    assert [line["event"] for line in lines] == (["key_readable_by_others"] if told else [])
    if told:
        assert lines[0]["fix"] == f"chmod 600 {key}"
    assert "secret" not in str(lines)
