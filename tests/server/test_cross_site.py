from __future__ import annotations

import pytest
from live import House
from starlette.routing import Route

from fedmoe.wire.http.middleware import foreign_host, foreign_page

HOST = "127.0.0.1:5000"


@pytest.mark.parametrize(
    ("sites", "origins"),
    [
        ([], []),
        (["none"], []),
        (["same-origin"], ["http://127.0.0.1:5000"]),
        (["same-origin"], ["HTTPS://127.0.0.1:5000"]),
    ],
)
def test_programs_and_the_servers_own_pages_are_taken(sites: list[str], origins: list[str]) -> None:
    assert foreign_page(HOST, sites, origins) is None


@pytest.mark.parametrize(
    ("sites", "origins"),
    [
        (["cross-site"], []),
        (["same-site"], []),
        (["Cross-Site"], []),
        (["same-origin", "cross-site"], []),
        (["what-comes-next"], []),
        ([""], []),
        ([], ["http://evil.example"]),
        ([], ["null"]),
        ([], [""]),
        ([], ["http://127.0.0.1:8080"]),
        ([], ["http://127.0.0.1"]),
        ([], ["http://localhost:5000"]),
        ([], ["http://127.0.0.1:5000.evil.example"]),
        ([], ["file://127.0.0.1:5000"]),
        ([], ["http://127.0.0.1:5000", "http://evil.example"]),
        (["same-origin"], ["http://evil.example"]),
    ],
)
def test_pages_of_other_sites_ports_and_schemes_are_not(sites: list[str], origins: list[str]) -> None:
    found = foreign_page(HOST, sites, origins)
    assert found is not None
    assert found.code == "cross_site"


def test_a_long_header_comes_back_cut_short() -> None:
    for found in (foreign_page(HOST, ["x" * 5000], []), foreign_host("x" * 5000, "Use http://127.0.0.1.")):
        assert found is not None
        assert len(found.detail) < 300


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}])
def test_without_tokens_no_method_of_any_route_takes_what_another_site_sends(
    house: House, headers: dict[str, str]
) -> None:
    house.register("python")
    before = house.kept()
    paths = [route.path for route in house.app.routes if isinstance(route, Route)]
    with house.client() as client:
        for path in [*paths, "/nothing"]:
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 403, (method, path)
        told = client.post("/rollback", json={"expert": "python", "to_version": 0}, headers=headers)
        assert told.json()["code"] == "cross_site"
    assert house.kept() == before


def test_with_tokens_the_token_decides(locked_house: House) -> None:
    """A page cannot add an `Authorization` header without being asked first, and nobody answers that question."""
    headers = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    with locked_house.client() as client:
        assert client.get("/list_experts", headers=headers).status_code == 401
