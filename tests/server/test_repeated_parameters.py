from __future__ import annotations

import pytest
from live import JOIN, House, content_digest, push_headers, push_parameters
from support import make_body

from fedmoe.wire.contract.messages import SAFETENSORS
from fedmoe.wire.http.middleware import repeated

BODY = make_body(0)


def query_keys(house: House) -> list[tuple[str, str, str]]:
    """Method, path and name of every query parameter there is, by the document."""
    paths = house.app.openapi()["paths"]
    return [
        (method, path, parameter["name"])
        for path, operations in paths.items()
        for method, operation in operations.items()
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "query"
    ]


def test_no_route_takes_a_parameter_twice(house: House) -> None:
    house.register("python")
    before = house.kept()
    found = query_keys(house)
    assert len(found) >= 30, found
    with house.client() as client:
        for method, path, name in found:
            for query in (f"{name}=a&{name}=b", f"{name}=1&x=2&{name}=1", f"{name}=&%{ord(name[0]):x}{name[1:]}="):
                answer = client.request(method, f"{path}?{query}", content=BODY, headers=push_headers(BODY))
                assert (answer.status_code, answer.json()["code"]) == (400, "malformed"), (path, name)
                assert f"{name!r} was given more than once" in answer.json()["detail"]
    assert house.kept() == before


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("Authorization", f"Bearer {JOIN}", "Bearer other-token-of-32-characters-0000"),
        ("Content-Type", SAFETENSORS, "application/json"),
        ("FedMoE-Protocol", "2", "3"),
        ("Host", "127.0.0.1", "elsewhere.example"),
        ("User-Agent", "python-httpx/0.1", "curl"),
    ],
)
def test_no_header_that_decides_is_taken_twice(locked_house: House, name: str, first: str, second: str) -> None:
    locked_house.register("python")
    before = locked_house.kept()
    with locked_house.client(JOIN) as client:
        for given in ((first, second), (first, first)):
            headers = {**client.headers, **push_headers(BODY)}
            kept = [(key, value) for key, value in headers.items() if key.lower() != name.lower()]
            both = [(name, value) for value in given]
            parameters = push_parameters()
            answer = client.post("/push_expert_update", params=parameters, content=BODY, headers=kept + both)
            assert (answer.status_code, answer.json()["code"]) == (400, "malformed"), answer.text
            assert f"the header {name.lower()} was given more than once" in answer.json()["detail"]
    assert locked_house.kept() == before


@pytest.mark.parametrize("apart", [True, False])
def test_two_digests_of_one_body_are_refused_and_other_algorithms_are_not(house: House, apart: bool) -> None:
    house.register("python")
    right, wrong = content_digest(BODY), content_digest(b"another body")
    before = house.kept()

    def pushed(*digests: str) -> int:
        headers = [(k, v) for k, v in push_headers(BODY).items() if k.lower() != "content-digest"]
        headers += [("Content-Digest", one) for one in (digests if apart else [", ".join(digests)])]
        return client.post("/push_expert_update", params=push_parameters(), content=BODY, headers=headers).status_code

    with house.client() as client:
        for digests in ((right, wrong), (wrong, right), (right, right)):
            assert pushed(*digests) == 400
        assert house.kept() == before
        assert pushed("sha-512=:AAAA:", right) == 200


def test_what_comes_once_is_clear() -> None:
    assert repeated(b"a=1&b=1&c=", [(b"Accept", b"a"), (b"accept", b"b"), (b"Host", b"h")]) is None
    assert repeated(b"a=1&&b", []) is None
    assert repeated(b"%ff=1&%ff=2", []) == "the parameter '\ufffd'"
    long = b"k" * 500
    told = repeated(long + b"=1&" + long + b"=2", [])
    assert told is not None
    assert len(told) < 120
