"""What the gateway's server may answer stands in `/openapi.json`; what `/readyz` says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from documented import check_documented, codes_in, schemathesis
from fastapi import FastAPI
from fastapi.routing import APIRoute
from live import listening
from serve_house import Served, serving

from fedmoe.gateway.serve.catalogue import CatalogueSnapshot
from fedmoe.gateway.serve.problems import STATUS
from fedmoe.gateway.serve.route_answers import ANSWERS
from fedmoe.gateway.serve.routes import create_app
from fedmoe.gateway.serve.service import Limits
from fedmoe.gateway.serve.version_watcher import WatchHealth
from fedmoe.inference.backend import ServedModel

GATEWAY = ServedModel("gateway", 1, "f" * 64)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), Limits(prompt_tokens=64, output_tokens=16)) as running:
        yield running


def app_of(served: Served) -> FastAPI:
    return create_app(served.service, served.watcher.health, None, True)


@pytest.fixture(scope="module")
def document(served: Served) -> dict[str, Any]:
    return app_of(served).openapi()


def test_every_route_stands_in_the_table_with_every_code(served: Served) -> None:
    app = app_of(served)
    routes = {(m, route.path) for route in app.routes if isinstance(route, APIRoute) for m in route.methods or ()}
    assert routes == set(ANSWERS)
    named: dict[str, int] = {}
    for operations in app.openapi()["paths"].values():
        for operation in operations.values():
            for status, told in operation["responses"].items():
                named |= dict.fromkeys(codes_in(told), int(status))
    of_no_route = {"upgrade_required", "unknown_route", "method_not_allowed"}
    assert named == {code: status for code, status in STATUS.items() if code not in of_no_route}


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("GET", "/v1/models", None, None),
        ("GET", "/v1/models/nobody", None, "model_not_found"),
        ("GET", "/metrics", None, None),
        ("HEAD", "/healthz", None, None),
        ("GET", "/readyz", None, None),
        ("DELETE", "/v1/models", None, "method_not_allowed"),
        ("POST", "/v1/completions", {"model": "nobody", "prompt": ""}, "model_not_found"),
        ("POST", "/v1/completions", {"model": "sql", "prompt": ""}, "empty_prompt"),
        ("POST", "/v1/completions", {"model": "sql", "prompt": "abc", "max_tokens": 2}, None),
        ("POST", "/v1/completions", {"model": "sql", "prompt": [1 << 30]}, "invalid_token"),
        ("POST", "/v1/completions", {"model": "sql", "prompt": "x " * 500}, "context_length_exceeded"),
        ("POST", "/v1/completions", {"model": "sql"}, "invalid_value"),
        (
            "POST",
            "/v1/chat/completions",
            {"model": "sql", "messages": [{"role": "user", "content": "a"}], "colour": 1},
            "unknown_parameter",
        ),
        ("POST", "/v1/chat/completions", [], "malformed"),
    ],
)
def test_what_is_answered_is_documented(
    served: Served, document: dict[str, Any], method: str, path: str, body: object, code: str | None
) -> None:
    with httpx2.Client(base_url=served.url, timeout=60, verify=False) as client:
        answer = client.request(method, path, json=body) if body is not None else client.request(method, path)
    type_ = answer.headers.get("content-type", "")
    check_documented(document, method, path, answer.status_code, type_, answer.content)
    assert (answer.json()["error"]["code"] if answer.status_code >= 400 and answer.content else None) == code


@pytest.mark.parametrize(
    ("models", "loaded", "behind", "ready"),
    [
        ({}, (), {}, True),  # a federation without experts: the base model is all there is
        ({}, (), {"gateway": "the backend is full"}, False),
        ({"gateway": GATEWAY}, (GATEWAY,), {"coordinator": "away"}, True),
        ({"gateway": GATEWAY}, (), {}, False),
    ],
)
def test_a_server_is_ready_when_it_has_what_it_says_it_serves(
    models: dict[str, ServedModel], loaded: tuple[ServedModel, ...], behind: dict[str, str], ready: bool
) -> None:
    service: Any = SimpleNamespace(
        catalogue=SimpleNamespace(snapshot=CatalogueSnapshot(models, 1.0)),
        backend=SimpleNamespace(loaded=lambda: {*loaded}),
    )
    app = create_app(service, lambda: WatchHealth(1.0, behind), None, True)
    with listening(app) as server:
        answer = httpx2.get(f"{server.url}/readyz")
        assert answer.status_code == httpx2.head(f"{server.url}/readyz").status_code == (200 if ready else 503)
        assert answer.json()["status"] == ("ready" if ready else "not ready")
        assert "full" not in answer.text


@pytest.mark.slow
def test_schemathesis_finds_nothing(served: Served, tmp_path: Path) -> None:
    schemathesis(served.url, tmp_path)
