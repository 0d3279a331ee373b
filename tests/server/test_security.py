from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from live import ADMIN, JOIN, House, content_digest, listening, open_house, push_headers, push_parameters
from starlette.routing import Route
from starlette.testclient import TestClient
from support import MANIFEST, make_body

from fedmoe.config import CoordinatorConfig
from fedmoe.distributed_coordinator import DistributedCoordinator
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.tokens import TokenGate
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.wire.contract.messages import ManifestMessage
from fedmoe.wire.http.bearer import hash_token, new_token
from fedmoe.wire.http.middleware import is_loopback

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def paths(house: House) -> list[str]:
    found = [route.path for route in house.app.routes if isinstance(route, Route)]
    assert len(found) >= 15, found
    return found


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def made(client: TestClient, **request: object) -> tuple[str, str]:
    """A token made by the administrator, and its hash."""
    answer = client.post("/tokens", json=request, headers=bearer(ADMIN))
    assert answer.status_code == 200, answer.text
    return answer.json()["token"], answer.json()["hash"]


def test_every_route_and_method_but_the_open_ones_asks_for_a_token(locked_house: House) -> None:
    open_to_all = []
    with locked_house.client() as client:
        for path in [
            *paths(locked_house),
            "/nothing",
            "/healthz/",
            "//healthz",
            "/HEALTHZ",
            "/healthz/../list_experts",
        ]:
            for method in METHODS:
                answer = client.request(method, path, follow_redirects=False)
                if answer.headers.get("location") == "/login":
                    assert path == "//healthz", "the page itself, of a host with this name"
                elif answer.status_code != 401:
                    open_to_all.append((method, path, answer.status_code))
                else:
                    assert answer.headers["www-authenticate"] == "Bearer"
    assert sorted(open_to_all) == [
        (method, path, 200) for method in ("GET", "HEAD") for path in ("/healthz", "/readyz")
    ]


def test_no_route_and_method_takes_a_token_that_nobody_knows(locked_house: House) -> None:
    taken = []
    with locked_house.client("a-token-of-32-characters-from-0000") as client:
        for path in paths(locked_house):
            for method in ("GET", "POST", "DELETE"):
                if client.request(method, path).status_code != 401:
                    taken.append((method, path))
    assert taken == [("GET", "/healthz"), ("GET", "/readyz")]


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer wrong-token-of-32-characters-0000", f"Basic {JOIN}", JOIN, f"Bearer {JOIN}x"],
)
def test_what_is_not_a_known_token_is_401_and_says_how_to_send_one(locked_house: House, header: str) -> None:
    with locked_house.client() as client:
        answer = client.get("/list_experts", headers={"Authorization": header})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorised")
    assert "Authorization: Bearer TOKEN" in answer.json()["fix"]


def test_a_token_of_bytes_that_are_no_text_is_401(locked_house: House) -> None:
    with locked_house.client() as client:
        answer = client.get("/list_experts", headers=[(b"Authorization", b"Bearer \xff\xfe\x80")])
    assert answer.status_code == 401


def test_a_large_push_without_a_token_is_401_and_not_413(locked_house: House) -> None:
    body = b"x" * (5 << 20)
    with locked_house.client() as client:
        answer = client.post("/push_expert_update", params=push_parameters(), content=body, headers=push_headers(body))
    assert answer.status_code == 401


def test_expired_and_revoked_tokens_are_401_and_say_which(locked_house: House) -> None:
    with locked_house.client() as client:
        short, _ = made(client, role="worker", worker="w1", expires_in=0.05)
        kept, kept_hash = made(client, role="worker", worker="w1")
        assert client.get("/list_experts", headers=bearer(kept)).status_code == 200
        assert client.post("/tokens/revoke", json={"hash": kept_hash}, headers=bearer(ADMIN)).status_code == 204
        time.sleep(0.06)
        for token, word in ((short, "expired"), (kept, "revoked")):
            answer = client.get("/list_experts", headers=bearer(token))
            assert answer.status_code == 401
            assert word in answer.json()["detail"]
        unknown = client.post("/tokens/revoke", json={"hash": "0" * 64}, headers=bearer(ADMIN))
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_token")


ADMIN_ROUTES = {
    "/rollback": {"expert": "python", "to_version": 0},
    "/retract": {"expert": "python", "worker": "w1"},
    "/tokens": {"role": "admin"},
    "/tokens/revoke": {"hash": hash_token(ADMIN)},
}


@pytest.mark.parametrize("path", ADMIN_ROUTES)
def test_admin_routes_refuse_every_other_role(locked_house: House, path: str) -> None:
    locked_house.register("python")
    before = locked_house.kept()
    with locked_house.client() as client:
        worker, _ = made(client, role="worker", worker="w1")
        for token in (JOIN, worker):
            answer = client.post(path, json=ADMIN_ROUTES[path], headers=bearer(token))
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert locked_house.kept() == before
    assert locked_house.gate.admit(f"Bearer {ADMIN}").role == "admin"


def test_only_administrators_see_the_list_of_tokens_and_nobody_sees_a_token(locked_house: House) -> None:
    with locked_house.client() as client:
        token, token_hash = made(client, worker="w1", experts=["python"], expires_in=60, label="site A")
        for other in (JOIN, token):
            assert client.get("/tokens", headers=bearer(other)).status_code == 403
        answer = client.get("/tokens", headers=bearer(ADMIN))
    (found,) = [one for one in answer.json()["tokens"] if one["hash"] == token_hash]
    assert {key: found[key] for key in ("label", "role", "worker", "experts", "origin", "revoked", "usable")} == {
        "label": "site A",
        "role": "worker",
        "worker": "w1",
        "experts": ["python"],
        "origin": "created",
        "revoked": False,
        "usable": True,
    }
    assert found["expires_at"] == pytest.approx(found["made_at"] + 60)
    assert (found["used_from"], found["used_at"] >= found["made_at"]) == ("testclient", True)
    for clear in (token, JOIN, ADMIN):
        assert clear not in answer.text


@pytest.mark.parametrize("label", ["x" * 61, "line\nbreak", "\x1b[31mred", "\u202eturned"])
def test_a_label_that_is_no_label_is_refused(locked_house: House, label: str) -> None:
    with locked_house.client(ADMIN) as client:
        assert client.post("/tokens", json={"label": label}).status_code == 422


def test_a_workers_token_is_good_for_its_worker_and_its_experts_only(locked_house: House) -> None:
    locked_house.register("python", "law")
    before = locked_house.kept()
    manifest = ManifestMessage.of(MANIFEST).model_dump(mode="json")
    statistic = {"kind": "loss", "values": {}}
    with locked_house.client() as client:
        token, _ = made(client, role="worker", worker="w1", experts=["python"])
        for expert, worker, expected in (("python", "w1", 200), ("law", "w1", 403), ("python", "w2", 403)):
            both = {"expert": expert, "worker": worker}
            answers = [
                client.post("/register_expert", json=both | {"manifest": manifest}, headers=bearer(token)),
                client.post("/push_statistics", json=both | statistic, headers=bearer(token)),
            ]
            assert {answer.status_code for answer in answers} <= {expected, 204}, both
        for expert, expected in (("python", 200), ("law", 403)):
            answer = client.post("/get_expert_weights", json={"expert": expert}, headers=bearer(token))
            assert answer.status_code == expected
        listed = client.get("/get_all_expert_weights", headers=bearer(token)).json()
        assert list(listed["experts"]) == ["python"]
        assert list(client.get("/get_all_expert_weights", headers=bearer(JOIN)).json()["experts"]) == ["law", "python"]
    assert locked_house.kept() == before


@pytest.mark.parametrize("others", [{"worker": "w2"}, {"expert": "law"}])
def test_a_token_for_another_worker_or_expert_is_403_before_the_body_is_read_52(
    locked_house: House, others: dict[str, str]
) -> None:
    """The body is announced and never sent; the answer comes nevertheless."""
    locked_house.register("python", "law")
    token = new_token()
    locked_house.gate.add(token, "worker", "w1", ["python"])
    body = make_body(1)
    query = "&".join(f"{key}={value}" for key, value in (push_parameters() | others).items())
    lines = [
        f"POST /push_expert_update?{query} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {token}",
        *(f"{name}: {value}" for name, value in push_headers(body).items()),
        f"Content-Length: {len(body)}",
    ]
    with listening(locked_house.app) as server, server.connect(5) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 403")
    assert b"forbidden" in answer


def test_a_token_is_kept_and_logged_as_a_hash_only(locked_house: House, capfd: pytest.CaptureFixture[str]) -> None:
    locked_house.register("python")
    body = make_body(1)
    with locked_house.client() as client:
        token, token_hash = made(client, role="worker", worker="w1")
        headers = push_headers(body) | bearer(token)
        assert client.post("/push_expert_update", params=push_parameters(), content=body, headers=headers).is_success
        client.post("/tokens/revoke", json={"hash": token_hash}, headers=bearer(ADMIN))
        refused = client.get("/list_experts", headers=bearer(token))
    told = "".join(capfd.readouterr())
    files = [path.read_bytes() for path in locked_house.folder.parent.rglob("*") if path.is_file()]
    assert any(token_hash.encode() in data for data in files)
    for clear in (token, ADMIN, JOIN):
        assert not any(clear.encode() in data for data in files)
        assert clear not in told + refused.text


def test_tokens_survive_a_restart_and_a_revoked_one_stays_revoked(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    gate = TokenGate(journal, True, time.time)
    good, bad = new_token(), new_token()
    gate.add(good, "worker", "w1", ["python"], expires_in=60)
    gate.revoke(gate.add(bad, "join").hash)
    reopened = TokenGate(journal, True, time.time)
    assert reopened.admit(f"Bearer {good}").experts == ("python",)
    with pytest.raises(RefusedError, match="revoked"):
        reopened.admit(f"Bearer {bad}")
    with pytest.raises(RefusedError, match="Give another one") as refused:
        reopened.add(bad, "join")  # as a start with the old FEDMOE_TOKEN would
    assert refused.value.code == "token_revoked"
    journal.close()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:5000", "localhost:5000", "LOCALHOST", "[::1]", "[::1]:5000", "127.9.9.9"]
)
def test_on_loopback_requests_to_this_machine_are_taken(house: House, host: str) -> None:
    with house.client() as client:
        assert client.get("/list_experts", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:5000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "[",
        "0.0.0.0",
        "10.0.0.7:5000",
    ],
)
def test_on_loopback_a_rebound_name_is_refused(house: House, host: str) -> None:
    with house.client() as client:
        for path in ("/list_experts", "/healthz"):
            answer = client.get(path, headers={"Host": host})
            assert (answer.status_code, answer.json()["code"]) == (421, "host_not_allowed")


def test_a_page_of_another_site_cannot_post_without_asking_first(house: House) -> None:
    """Browsers send text/plain and forms across sites without a preflight; JSON must therefore be declared."""
    house.register("python")
    before = house.kept()
    with house.client() as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            answer = client.post(
                "/rollback", content=b'{"expert":"python","to_version":0}', headers={"Content-Type": kind}
            )
            assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_type")
    assert house.kept() == before


def test_a_page_of_another_site_cannot_read_answers(house: House) -> None:
    with house.client() as client:
        answer = client.get("/list_experts", headers={"Origin": "http://evil.example"})
        preflight = client.options("/tokens", headers={"Origin": "http://evil.example"})
    assert not [name for name in [*answer.headers, *preflight.headers] if name.startswith("access-control")]
    assert (answer.status_code, preflight.status_code) == (403, 403)


def opened(folder: Path, **parameters: object) -> DistributedCoordinator:
    return DistributedCoordinator(CoordinatorConfig(state_dir=str(folder / "state"), **parameters))  # type: ignore[arg-type]


def closed(coordinator: DistributedCoordinator) -> DistributedCoordinator:
    coordinator.service.start()
    coordinator.close()
    return coordinator


def test_on_an_address_that_others_reach_tokens_are_made_once(tmp_path: Path) -> None:
    first = closed(opened(tmp_path, host="0.0.0.0"))
    assert set(first.new_tokens) == {"join", "admin"}
    assert first.gate.required
    assert len(set(first.new_tokens.values())) == 2
    assert all(len(token) >= 43 for token in first.new_tokens.values())
    again = closed(opened(tmp_path, host="0.0.0.0"))
    assert again.new_tokens == {}
    assert again.gate.admit(f"Bearer {first.new_tokens['join']}").role == "join"


def test_a_given_token_is_used_instead_of_a_made_one(tmp_path: Path) -> None:
    coordinator = closed(opened(tmp_path, host="0.0.0.0", token=JOIN))
    assert set(coordinator.new_tokens) == {"admin"}
    assert coordinator.gate.admit(f"Bearer {JOIN}").role == "join"


@pytest.mark.parametrize("parameters", [{"host": "0.0.0.0", "insecure": True}, {"host": "127.0.0.1"}, {"host": "::1"}])
def test_loopback_and_insecure_make_no_tokens(tmp_path: Path, parameters: dict[str, object]) -> None:
    coordinator = closed(opened(tmp_path, **parameters))
    assert coordinator.new_tokens == {}
    assert not coordinator.gate.required


def test_a_token_given_on_loopback_is_asked_for(tmp_path: Path) -> None:
    coordinator = closed(opened(tmp_path, token=JOIN))
    assert coordinator.gate.required
    with TestClient(coordinator.app, base_url="http://127.0.0.1") as client:
        assert client.get("/list_experts").status_code == 401


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("", False),
        ("10.0.0.1", False),
        ("name", False),
    ],
)
def test_only_addresses_of_this_machine_are_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


AUDITED = """
import pickle, sys, tempfile
from pathlib import Path
sys.path.insert(0, {tests!r})
from live import open_house, push_headers, push_parameters
seen = []
watched = ("pickle.", "os.system", "subprocess.")
sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(watched) else None)
class Bomb:
    def __reduce__(self):
        return (print, ("unpickled",))
bodies = [pickle.dumps(Bomb(), protocol) for protocol in range(6)]
with open_house(Path(tempfile.mkdtemp(dir={folder!r}))) as house:
    house.register("python")
    with house.client() as client:
        for body in bodies:
            for kind in (None, "application/octet-stream", "application/x-pytorch", "application/json"):
                headers = push_headers(body) | ({{"Content-Type": kind}} if kind else {{}})
                answer = client.post("/push_expert_update", params=push_parameters(), content=body, headers=headers)
                assert answer.status_code == (415 if kind else 400), answer.text
                answer = client.post("/register_expert", content=body, headers=headers)
                assert answer.status_code in (400, 415, 422), answer.text
assert seen == [], seen
pickle.loads(bodies[4])
assert "pickle.find_class" in seen
print("none seen")
"""


def test_a_pickle_is_never_read_42(tmp_path: Path) -> None:
    """Python tells an audit hook of every class that a pickle looks up; the hook is proved to work at the end."""
    script = AUDITED.format(tests=str(Path(__file__).parent.parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["unpickled", "none seen"]
    assert done.stdout.count("unpickled") == 1


def test_digests_are_of_the_body_as_sent() -> None:
    assert content_digest(b"") == "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"


def test_insecure_takes_requests_for_any_host(tmp_path: Path) -> None:
    coordinator = closed(opened(tmp_path, host="0.0.0.0", insecure=True))
    with TestClient(coordinator.app, base_url="http://coordinator.example:5000") as client:
        assert client.get("/federation").status_code == 200


def test_open_house_is_closed_to_other_hosts_but_a_locked_one_is_not(tmp_path: Path) -> None:
    with open_house(tmp_path, tokens=True) as house, house.client(JOIN) as client:
        assert client.get("/list_experts", headers={"Host": "coordinator.example"}).status_code == 200
