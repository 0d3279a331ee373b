"""The page without a browser: who sees it, what its headers forbid, login, and the stream of the status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from builders import wait_until
from live import ADMIN, JOIN, House, LiveServer, listening, open_house, push_headers, push_parameters
from starlette.routing import Route
from support import make_body

from fedmoe.server.access.security import VIEWER_PATHS
from fedmoe.server.page.login import COOKIE, LINK_SECONDS, LoginLinks
from fedmoe.wire.contract.status import StatusInfo
from fedmoe.wire.http.middleware import OPEN_PATHS

VIEWER = "a-viewer-who-only-looks"
OWN = {"sec-fetch-site": "same-origin"}


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[House, LiveServer]]:
    with open_house(tmp_path, tokens=True) as house, listening(house.app) as server:
        house.register("law")
        house.gate.add(VIEWER, "viewer")
        yield house, server
        house.app.state.parts.live.close()


def ask(server: LiveServer, method: str, path: str, **options: object) -> httpx2.Response:
    return httpx2.request(method, server.url + path, trust_env=False, **options)  # type: ignore[arg-type]


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_without_a_token_there_is_the_login_page_alone(guarded: tuple[House, LiveServer]) -> None:
    _, server = guarded
    assert (ask(server, "GET", "/").status_code, ask(server, "GET", "/").headers["location"]) == (303, "/login")
    for path in ("/login", "/login.js", "/words.js", "/page.css", "/base.js", "/base.css"):
        answer = ask(server, "GET", path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "script-src" not in policy  # so scripts are the server's own files, and nothing else
        assert "unsafe-eval" not in policy
    for path in ("/page.js", "/plotly.js", "/live", "/status"):
        assert ask(server, "GET", path).status_code == 401


def test_a_pasted_token_becomes_a_cookie_that_counts_for_the_page_itself_alone(
    guarded: tuple[House, LiveServer],
) -> None:
    house, server = guarded
    assert ask(server, "POST", "/session", headers=bearer(ADMIN)).status_code == 403  # no browser's page says so
    assert ask(server, "POST", "/session", headers=bearer("nobody's") | OWN).status_code == 401
    answer = ask(server, "POST", "/session", headers=bearer(ADMIN) | OWN)
    assert answer.status_code == 204
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    jar = {"cookie": f"{COOKIE}={ADMIN}"}
    assert ask(server, "GET", "/", headers=jar).status_code == 200
    assert ask(server, "GET", "/status", headers=jar | OWN).json()["role"] == "admin"
    retire = {"json": {"expert": "law"}}
    for site in ({}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "http://evil.test"}):
        assert ask(server, "POST", "/retire_expert", headers=jar | site, **retire).status_code == 401
    assert not house.service.coordinator.expert("law").retired
    assert ask(server, "POST", "/retire_expert", headers=jar | OWN, **retire).status_code == 200
    ended = ask(server, "POST", "/session/end", headers=jar | OWN)
    assert "max-age=0" in ended.headers["set-cookie"].lower()
    assert ask(server, "GET", "/status", headers=jar | OWN).status_code == 200  # the token is its owner's


def test_a_login_by_a_link_ends_with_the_log_out_of_its_browser_and_no_other_one(
    guarded: tuple[House, LiveServer],
) -> None:
    house, server = guarded
    links = LoginLinks(house.gate)
    mine, another = ({"cookie": f"{COOKIE}={links.exchange(links.new())}"} | OWN for _ in range(2))
    assert ask(server, "POST", "/session/end", headers=mine).status_code == 204
    wait_until(lambda: ask(server, "GET", "/status", headers=mine).status_code == 401, 30)
    assert ask(server, "GET", "/status", headers=another).status_code == 200


def test_a_link_works_once_and_not_for_long(guarded: tuple[House, LiveServer]) -> None:
    house, _ = guarded
    clock = [0.0]
    links = LoginLinks(house.gate, lambda: clock[0])
    code, late = links.new(), links.new()
    assert links.exchange("something-else") is None
    token = links.exchange(code)
    assert token is not None
    assert house.gate.admit(f"Bearer {token}").role == "admin"
    assert links.exchange(code) is None
    clock[0] = LINK_SECONDS + 1
    assert links.exchange(late) is None
    assert [row.label for row in house.gate.listed() if row.label.startswith("login")] == ["login by a link"]


def test_a_viewer_looks_and_a_worker_sees_its_own(guarded: tuple[House, LiveServer]) -> None:
    _, server = guarded
    viewer = bearer(VIEWER)
    for path in ("/", "/page.js", "/status", "/metrics", "/list_experts"):
        assert ask(server, "GET", path, headers=viewer).status_code == 200, path
    body = make_body(0)
    pushed = ask(
        server,
        "POST",
        "/push_expert_update",
        params=push_parameters(0, 0, expert="law"),
        content=body,
        headers=push_headers(body) | viewer,
    )
    assert (pushed.status_code, pushed.json()["code"]) == (403, "forbidden")
    for path in ("/get_gateway_weights", "/tokens", "/quarantine"):
        assert ask(server, "GET", path, headers=viewer).status_code == 403, path
    assert ask(server, "POST", "/heartbeat", headers=viewer, json={}).status_code == 403
    assert ask(server, "GET", "/metrics", headers=bearer(JOIN)).status_code == 403


def first_event(server: LiveServer, last: str | None, patience: float) -> str | None:
    """The id of the first event of a new stream; None if none comes."""
    headers = {"last-event-id": last} if last else {}
    with httpx2.stream("GET", f"{server.url}/live", headers=headers, trust_env=False, timeout=patience) as answer:
        try:
            return next(line.removeprefix("id: ") for line in answer.iter_lines() if line.startswith("id: "))
        except httpx2.ReadTimeout:
            return None


def test_the_stream_begins_with_the_state_and_goes_on_where_it_was(tmp_path: Path) -> None:
    with open_house(tmp_path) as house, listening(house.app) as server:
        house.register("law")
        first = first_event(server, None, 30.0)
        assert first is not None
        assert first_event(server, first, 1.0) != first, "what the page has is not sent again"
        house.app.state.parts.live.close()
        assert ask(server, "GET", "/live").text == "retry: 1000\n\n"  # at a stop every stream ends at once


def test_a_viewer_and_an_administrator_with_open_pages_are_told_their_own_roles(
    guarded: tuple[House, LiveServer],
) -> None:
    _, server = guarded
    roles = {}
    with ExitStack() as opened:
        for token, role in ((ADMIN, "admin"), (VIEWER, "viewer"), (JOIN, "join")):
            stream = httpx2.stream("GET", f"{server.url}/live", headers=bearer(token), trust_env=False, timeout=30.0)
            lines = opened.enter_context(stream).iter_lines()
            data = next(line.removeprefix("data: ") for line in lines if line.startswith("data: "))
            roles[role] = StatusInfo.model_validate_json(data)
    assert {role: status.role for role, status in roles.items()} == {role: role for role in roles}
    assert roles["join"].disk is None


def test_a_viewer_is_refused_every_route_that_is_not_there_to_look(guarded: tuple[House, LiveServer]) -> None:
    house, server = guarded
    asked = 0
    for route in house.app.routes:
        if isinstance(route, Route) and route.path not in VIEWER_PATHS | OPEN_PATHS:
            for method in (route.methods or set()) - {"HEAD"}:
                answer = ask(server, method, route.path, headers=bearer(VIEWER), json={"expert": "law"})
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), (method, route.path)
                asked += 1
    assert asked > 20
