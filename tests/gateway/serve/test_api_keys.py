"""Keys, hosts, and who is answered without either."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from fedmoe.gateway.serve.api_keys import KeyFileError, read_keys
from fedmoe.gateway.serve.problems import refusal
from fedmoe.gateway.serve.routes import add_guard
from fedmoe.wire.contract.versions import PROTOCOL, PROTOCOL_HEADER
from fedmoe.wire.http.bearer import hash_token
from fedmoe.wire.http.middleware import ProtocolMiddleware

KEYS = frozenset({hash_token("right")})


def client(keys: frozenset[str] | None, loopback_only: bool = True, host: str = "127.0.0.1") -> TestClient:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("in")

    app = Starlette(routes=[Route("/healthz", answer), Route("/v1/models", answer)])
    add_guard(app, keys, loopback_only)
    return TestClient(app, base_url=f"http://{host}")


@pytest.mark.parametrize("sent", [None, "", "Bearer", "Bearer wrong", "Basic right", "right"])
def test_without_the_right_key_nobody_comes_in(sent: str | None) -> None:
    answer = client(KEYS).get("/v1/models", headers={} if sent is None else {"Authorization": sent})
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_right_key_opens_from_any_host() -> None:
    answer = client(KEYS, host="gateway.example").get("/v1/models", headers={"Authorization": "Bearer right"})
    assert answer.text == "in"


def test_a_client_of_another_protocol_is_told_so_as_the_openai_interface_tells_errors_71() -> None:
    app = client(None).app
    assert isinstance(app, Starlette)
    app.add_middleware(ProtocolMiddleware, server="this gateway server", refuse=refusal)
    asked = TestClient(app, base_url="http://127.0.0.1")
    answer = asked.get("/v1/models", headers={PROTOCOL_HEADER: "99"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (426, "upgrade_required")
    assert "Upgrade this gateway server" in answer.json()["error"]["message"]
    plain = asked.get("/v1/models")
    assert (plain.text, plain.headers[PROTOCOL_HEADER]) == ("in", str(PROTOCOL))


def test_health_is_for_everybody() -> None:
    assert client(KEYS).get("/healthz").text == "in"


@pytest.mark.parametrize("host", ["127.0.0.1:80", "localhost", "[::1]:80"])
def test_without_keys_this_machine_is_answered(host: str) -> None:
    assert client(None).get("/v1/models", headers={"Host": host}).text == "in"


@pytest.mark.parametrize("host", ["evil.example", "10.0.0.1", ""])
def test_without_keys_others_are_not(host: str) -> None:
    assert client(None).get("/v1/models", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "same-site"}])
@pytest.mark.parametrize("loopback_only", [True, False])
def test_without_keys_no_method_takes_what_a_page_of_another_site_sends(
    headers: dict[str, str], loopback_only: bool
) -> None:
    for method in ("GET", "HEAD", "POST", "OPTIONS"):
        answer = client(None, loopback_only).request(method, "/v1/models", headers=headers)
        assert answer.status_code == 403
    told = client(None, loopback_only).get("/healthz", headers=headers).json()["error"]
    assert told["code"] == "cross_site"


def test_everybody_is_answered_where_that_was_asked_for() -> None:
    assert client(None, loopback_only=False).get("/v1/models", headers={"Host": "evil.example"}).text == "in"


def test_a_missing_file_is_made_with_one_key_that_is_not_in_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys"
    keys, made = read_keys(file)
    assert made is not None
    assert keys == {hash_token(made)}
    assert made not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_keys(file) == (keys, None)


def test_a_file_of_hashes_has_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{hash_token('a')}  -\n{hash_token('b')} for b\n")
    assert read_keys(file)[0] == {hash_token("a"), hash_token("b")}


@pytest.mark.parametrize(("text", "says"), [("", "no key hash"), ("fmk_clear\n", "line 1"), ("A" * 64, "line 1")])
def test_a_file_that_opens_to_nobody_or_holds_keys_in_clear_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(KeyFileError, match=says):
        read_keys(file)
