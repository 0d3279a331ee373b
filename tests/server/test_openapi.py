"""`/openapi.json` names what the coordinator may answer: every route, status and code."""

from __future__ import annotations

from pathlib import Path

import pytest
from documented import check_documented, codes_in, schemathesis
from fastapi.routing import APIRoute
from live import ADMIN, House, listening, open_house, push_headers, push_parameters
from support import make_body

from fedmoe.coordinator import Aggregation
from fedmoe.server.access.problems import STATUS
from fedmoe.server.routes.documented_answers import ANSWERS, OTHER_STATUS

#: Told when a coordinator starts, not by a route.
AT_START = {"rule_mismatch"}


def test_every_route_stands_in_the_table_and_nothing_else(house: House) -> None:
    routes = {(m, route.path) for route in house.app.routes if isinstance(route, APIRoute) for m in route.methods or ()}
    assert routes == set(ANSWERS)


def test_every_code_stands_with_its_status(house: House) -> None:
    named: dict[str, int] = {}
    for operations in house.app.openapi()["paths"].values():
        for operation in operations.values():
            for status, told in operation["responses"].items():
                named |= dict.fromkeys(codes_in(told), int(status))
    assert named == {code: status for code, status in (OTHER_STATUS | STATUS).items() if code not in AT_START}


def test_the_document_is_whole_and_has_none_of_the_forms_that_are_never_sent(house: House) -> None:
    with house.client() as client:
        document = client.get("/openapi.json").json()
        assert client.get("/openapi.json").json() == document
    text = str(document)
    assert "HTTPValidationError" not in text
    assert set(document["components"]["schemas"]) >= {"Problem", "WeightsAsJson", "UpdateResult"}
    push = document["paths"]["/push_expert_update"]["post"]
    assert list(push["requestBody"]["content"]) == ["application/vnd.safetensors"]
    assert "Content-Digest" in [parameter["name"] for parameter in push["parameters"]]
    weights = document["paths"]["/get_gateway_weights"]["get"]["responses"]
    assert set(weights["200"]["content"]) == {"application/json", "application/vnd.safetensors"}
    assert {"304", "404", "406", "429"} <= weights.keys()


def test_a_token_is_asked_for_where_the_document_says_so(house: House, locked_house: House) -> None:
    assert "security" not in house.app.openapi()
    document = locked_house.app.openapi()
    assert document["security"] == [{"token": []}]
    open_to_all = [path for path, operations in document["paths"].items() if operations.get("get", {}).get("security")]
    assert open_to_all == []
    assert document["paths"]["/readyz"]["get"]["security"] == []


def test_an_answer_that_is_not_documented_fails_the_tests(house: House) -> None:
    problem, document = b'{"code": "%s"}', house.app.openapi()
    check_documented(document, "GET", "/federation", 401, "application/problem+json", problem % b"unauthorised")
    with pytest.raises(AssertionError, match=r"is not in /openapi.json"):
        check_documented(document, "GET", "/federation", 401, "application/problem+json", problem % b"busy")
    with pytest.raises(AssertionError, match=r"is not in /openapi.json"):
        check_documented(document, "HEAD", "/federation", 503, "application/problem+json", problem % b"busy")


def landed(house: House) -> None:
    """Two experts: one with updates of two workers and what one of them told, and one that is retired."""
    house.register("python", "law")
    for number, worker in enumerate(["w1", "w2", "w1"]):
        body, push = make_body(number), push_parameters(number, worker=worker, loss=1.5)
        with house.client(ADMIN) as client:
            answer = client.post("/push_expert_update", params=push, content=body, headers=push_headers(body))
            assert answer.status_code == 200, answer.text
    told = {"expert": "python", "worker": "w1", "kind": "held_out", "values": {"loss": 1.25}}
    with house.client(ADMIN) as client:
        assert client.post("/push_statistics", json=told).status_code == 204
        assert client.post("/retire_expert", json={"expert": "law"}).status_code == 200


@pytest.mark.slow
def test_schemathesis_finds_nothing_without_experts(tmp_path: Path) -> None:
    with open_house(tmp_path) as house, listening(house.app) as server:
        schemathesis(server.url, tmp_path)


@pytest.mark.slow
def test_schemathesis_finds_nothing_where_updates_have_landed(tmp_path: Path) -> None:
    with open_house(tmp_path) as house:
        landed(house)
        with listening(house.app) as server:
            schemathesis(server.url, tmp_path)


@pytest.mark.slow
def test_schemathesis_finds_nothing_with_tokens_and_an_evaluation_gate(tmp_path: Path) -> None:
    with open_house(tmp_path, Aggregation(evaluation_gate=True), tokens=True) as house:
        landed(house)
        with listening(house.app) as server:
            schemathesis(server.url, tmp_path, ["--header", f"Authorization: Bearer {ADMIN}"])
