from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import House, open_house, push_headers, push_parameters
from starlette.testclient import TestClient
from support import MANIFEST, make_body

from fedmoe.wire.contract.messages import ManifestMessage

NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
BAD_FOR_ALL = {
    "55 parent folder": "..",
    "55 encoded parent folder": "%2e%2e",
    "55 path": "a/b",
    "55 NUL": "a\x00b",
    "55 encoded NUL": "a%00b",
    "55 encoded backslash": "..%5c",
    "55 backslash": "..\\..\\x",
    "55 right to left": "a\u202eb",
    "55 too long": "a" * 5000,
    "55 one too long": "a" * 64,
    "55 empty": "",
    "55 emoji": "🐍",
    "55 composed": NFC,
    "55 decomposed": NFD,
    "55 leading dash": "-rf",
    "55 leading underscore": "_a",
    "55 trailing newline": "python\n",
    "55 blank": " ",
    "55 other digits": "a\u0661",
    "56 SQL": "a';drop table events;--",
    "56 HTML": "<script>",
    "56 format string": "%s%n{0}",
    "56 terminal": "\x1b[31m",
}
BAD_EXPERTS = BAD_FOR_ALL | {"55 device": "CON", "55 upper case": "Python"}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with open_house(tmp_path_factory.mktemp("names")) as opened:
        opened.register("python")
        yield opened


@pytest.fixture(scope="module")
def http(house: House) -> Iterator[TestClient]:
    with house.client() as client:
        yield client


def manifest() -> dict[str, Any]:
    return ManifestMessage.of(MANIFEST).model_dump(mode="json")


@pytest.mark.parametrize("name", BAD_EXPERTS)
def test_names_that_are_no_names_of_experts_are_422_55(house: House, http: TestClient, name: str) -> None:
    before, bad, body = house.kept(), BAD_EXPERTS[name], make_body(1)
    answers = [
        http.post("/register_expert", json={"expert": bad, "worker": "w1", "manifest": manifest()}),
        http.post("/get_expert_weights", json={"expert": bad}),
        http.post(
            "/push_expert_update",
            params=push_parameters() | {"expert": bad},
            content=body,
            headers=push_headers(body),
        ),
        http.get("/statistics", params={"expert": bad}),
        http.post("/rollback", json={"expert": bad, "to_version": 0}),
    ]
    assert [answer.status_code for answer in answers] == [422] * 5
    for answer in answers:
        assert "expert" in answer.json()["detail"]
        assert answer.text.isascii()
    assert house.kept() == before


@pytest.mark.parametrize("name", BAD_FOR_ALL)
def test_names_that_are_no_names_of_workers_are_422_55(house: House, http: TestClient, name: str) -> None:
    before, bad, body = house.kept(), BAD_FOR_ALL[name], make_body(1)
    answers = [
        http.post("/register_expert", json={"expert": "python", "worker": bad, "manifest": manifest()}),
        http.post(
            "/push_expert_update",
            params=push_parameters() | {"worker": bad},
            content=body,
            headers=push_headers(body),
        ),
        http.post("/retract", json={"expert": "python", "worker": bad}),
    ]
    assert [answer.status_code for answer in answers] == [422] * 3
    assert house.kept() == before


@pytest.mark.parametrize("name", ["a", "python_expert", "0-1", "con", "a" * 63])
def test_plain_names_are_taken_55(http: TestClient, name: str) -> None:
    assert http.post("/register_expert", json={"expert": name, "worker": "W-1", "manifest": manifest()}).is_success


@pytest.mark.parametrize("text", ["a\x00b", "\x1b[31mred", "a\u202eb", "a\nb", "\u2028"])
def test_texts_for_people_hold_nothing_that_moves_a_cursor_56(house: House, http: TestClient, text: str) -> None:
    before, wanted = house.kept(), manifest()
    wanted["base"]["name"] = text
    named = {"expert": "python", "worker": "w1"}
    assert http.post("/register_expert", json=named | {"manifest": wanted}).status_code == 422
    assert http.post("/rollback", json={"expert": "python", "to_version": 0, "reason": text}).status_code == 422
    statistic = named | {"kind": "loss", "values": {text: 1.0}}
    assert http.post("/push_statistics", json=statistic).status_code == 422
    assert house.kept() == before


@pytest.mark.parametrize("name", ["", "a/b", "a b", "\u202e", "x" * 201, "a\x00"])
def test_names_of_modules_are_plain_too_56(http: TestClient, name: str) -> None:
    wanted = manifest() | {"modules": [[name, 2, 2]]}
    answer = http.post("/register_expert", json={"expert": "e", "worker": "w1", "manifest": wanted})
    assert answer.status_code == 422


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400", '"x"'])
def test_statistics_hold_finite_numbers_only_57(http: TestClient, value: str) -> None:
    text = f'{{"expert":"python","worker":"w1","kind":"loss","values":{{"a":{value}}}}}'
    answer = http.post("/push_statistics", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    json.loads(answer.text, parse_constant=pytest.fail)


def test_statistics_hold_at_most_256_numbers_57(http: TestClient) -> None:
    told = {"expert": "python", "worker": "w1", "kind": "loss", "values": {f"k{i}": 1.0 for i in range(257)}}
    assert http.post("/push_statistics", json=told).status_code == 422


def test_an_unknown_key_is_an_error(http: TestClient) -> None:
    answer = http.post("/get_expert_weights", json={"expert": "python", "dtpye": "int8"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert "dtpye" in answer.json()["detail"]
    body = make_body(1)
    parameters = push_parameters() | {"sequnce": 1}
    answer = http.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body))
    assert answer.status_code == 422


JSON_ROUTES = [
    "/register_expert",
    "/get_expert_weights",
    "/push_statistics",
    "/rollback",
    "/retract",
    "/tokens",
    "/tokens/revoke",
]
KEYS = ["expert", "worker", "manifest", "base", "modules", "rank", "alpha", "dtype", "kind", "values", "to_version"]
KEYS += ["reason", "role", "experts", "expires_in", "hash", "seed", "name"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["python", "w1", "a" * 64]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=6),
    max_leaves=12,
)


@pytest.mark.parametrize("path", JSON_ROUTES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values)
def test_no_json_ever_gives_a_server_error(http: TestClient, path: str, value: object) -> None:
    content = json.dumps(value).encode()
    answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, (content, answer.text)
    assert answer.status_code < 400 or answer.json()["code"]


@pytest.mark.parametrize("path", JSON_ROUTES)
def test_no_bytes_ever_give_a_server_error(http: TestClient, path: str) -> None:
    """Bad UTF-8, lone surrogates, deep nesting, huge numbers, truncation, and random damage to a good request."""
    good = json.dumps({"expert": "python", "worker": "w1", "manifest": manifest(), "to_version": 0}).encode()
    rng = random.Random(path)
    bodies = [b"", b"\xff\xfe", b"{", b'"', b"[" * 100_000, b"{" * 100_000, b'{"a":' * 50_000, b"9" * 10_000]
    bodies += [b'{"\\ud800":1}', b'{"expert":"\\ud800"}', b'{"expert":"\xed\xa0\x80"}', b"\x00" * 100, b"NaN", b"null"]
    bodies += [b'{"' + b"k" * 100_000 + b'":1}', b'{"to_version":1e999,"expert":"python"}', b"\xef\xbb\xbf{}"]
    for _ in range(40):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 5)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        bodies += [bytes(damaged), bytes(damaged[: rng.randrange(len(damaged))])]
    for body in bodies:
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500 or answer.is_success, (body[:100], answer.text)
        assert len(answer.content) < 1 << 20


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parameters=st.dictionaries(
        st.sampled_from(["expert", "worker", "epoch", "sequence", "base_version", "answer", "loss", "steps"]),
        st.text(max_size=20),
    )
)
def test_no_query_ever_gives_a_server_error(http: TestClient, parameters: dict[str, str]) -> None:
    usable = {key: value.encode("utf-8", "replace").decode() for key, value in parameters.items()}
    body = make_body(1)
    answer = http.post("/push_expert_update", params=usable, content=body, headers=push_headers(body))
    assert 400 <= answer.status_code < 500
    assert http.get("/get_gateway_weights", params={"dtype": usable.get("expert", "x")}).status_code < 500
    assert http.get("/statistics", params=usable).status_code < 500
