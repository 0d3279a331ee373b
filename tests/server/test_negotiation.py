from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import House, push_headers, push_parameters
from starlette.routing import Route
from support import make_body

from fedmoe.wire.contract.messages import SAFETENSORS
from fedmoe.wire.http.middleware import JSON, excludes, weight_form

WEIGHTS = ("/get_gateway_weights", "/get_all_expert_weights")


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ([], JSON),
        (["*/*"], JSON),
        (["text/html"], JSON),
        (["application/json"], JSON),
        ([SAFETENSORS], SAFETENSORS),
        (["Application/VND.Safetensors"], SAFETENSORS),
        ([f"{SAFETENSORS}, application/json"], SAFETENSORS),
        ([JSON, SAFETENSORS], SAFETENSORS),
        ([f"{SAFETENSORS};q=0.5, application/json"], JSON),
        ([f"{SAFETENSORS};q=0.5, application/json;q=0.4"], SAFETENSORS),
        ([f"{SAFETENSORS};q=0"], JSON),
        ([f"{SAFETENSORS} ; Q = 0.000 , */*"], JSON),
        ([f"{SAFETENSORS};q=0, application/json;q=0"], None),
        (["application/json;q=0"], None),
        (["application/json;q=0, */*"], SAFETENSORS),
        (["application/*;q=0"], None),
        (["*/*;q=0"], None),
        ([f"*/*;q=0, {SAFETENSORS}"], SAFETENSORS),
        (["*/*;q=0, application/json"], JSON),
        (["application/json;q=0, application/json"], None),
        (["application/json;version=2;q=0"], JSON),
        (["application/json;q=nonsense"], JSON),
        (["application/json;q=-1"], JSON),
        ([",;,=;q"], JSON),
    ],
)
def test_weights_go_out_in_the_form_that_is_taken_and_never_in_one_that_is_excluded(
    accept: list[str], form: str | None
) -> None:
    assert weight_form(accept) == form


@given(st.lists(st.text("aj*/;q=0.1 ,\n\xff", max_size=40), max_size=4))
def test_any_header_is_read(accept: list[str]) -> None:
    assert weight_form(accept) in (JSON, SAFETENSORS, None)
    assert not excludes([], JSON)


def test_who_never_takes_json_gets_none_and_nothing_changes(house: House) -> None:
    """Whatever the route that answers with JSON: the refusal comes before anything is done."""
    house.register("python")
    before = house.kept()
    never = {"Accept": "application/json;q=0"}
    with house.client() as client:
        others = ("/metrics", "/live")  # answered in another form
        for route in [route for route in house.app.routes if isinstance(route, Route) and route.path not in others]:
            for method in (route.methods or set()) & {"GET", "POST"}:
                answer = client.request(method, route.path, headers=never, json={} if method == "POST" else None)
                assert answer.headers["content-type"] == "application/problem+json", route.path
                assert 400 <= answer.status_code < 500, (method, route.path)
        assert client.get("/live", headers={"Accept": "text/event-stream;q=0"}).status_code == 406
        body = make_body(0)
        for wanted in ("result", "weights"):
            headers = push_headers(body) | never
            parameters = push_parameters() | {"answer": wanted}
            answer = client.post("/push_expert_update", params=parameters, content=body, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (406, "not_acceptable")
        for path in WEIGHTS:
            answer = client.get(path, headers=never)
            assert (answer.status_code, answer.json()["code"]) == (406, "not_acceptable")
            assert (
                client.get(path, headers={"Accept": "application/json;q=0, */*"}).headers["content-type"] == SAFETENSORS
            )
    assert house.kept() == before


def test_statistics_are_safetensors_or_nothing(house: House) -> None:
    house.register("python")
    with house.client() as client:
        query = {"expert": "python", "kind": "moments"}
        refused = client.get("/data_statistics", params=query, headers={"Accept": f"{SAFETENSORS};q=0"})
        assert refused.status_code in (404, 406)
        assert (
            client.get("/data_statistics", params=query, headers={"Accept": "application/json;q=0"}).status_code == 404
        )
