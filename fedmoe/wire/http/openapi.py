"""`/openapi.json`: FastAPI's document, with the answers and problem codes of each route added.

A route that refuses says so with a code; the tables of `route_answers` name the codes of every route, and each becomes
part of the answer with its status.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

Json = dict[str, object]
#: Method and path of a route.
Route = tuple[str, str]


@dataclass(frozen=True)
class Answers:
    """What a route may answer, by the codes of its problems and by status, and what it takes beside JSON."""

    problems: tuple[str, ...] = ()
    others: Mapping[int, Json] = field(default_factory=dict)
    parameters: tuple[Json, ...] = ()
    body: Json | None = None


@dataclass(frozen=True)
class Problems:
    """How a server reports problems: the status of a code, the answer with a status and its codes, their schemas."""

    status: Callable[[str], int]
    answer: Callable[[int, list[str]], Json]
    schemas: Mapping[str, Json]
    #: What any route may answer.
    everywhere: tuple[str, ...]
    #: What a route may answer that takes a body in JSON, and one that takes parameters.
    with_json: tuple[str, ...]
    with_parameters: tuple[str, ...]


def install(app: FastAPI, table: Mapping[Route, Answers], problems: Problems, tokens: bool) -> None:
    """Answer `/openapi.json` with this; `tokens` says that the server asks for one on all but the open paths."""

    def described() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app, table, problems, tokens)
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def _described(app: FastAPI, table: Mapping[Route, Answers], problems: Problems, tokens: bool) -> Json:
    document: Json = get_openapi(title=app.title, version=app.version, routes=app.routes)
    paths = _object(document["paths"])
    for path, operations in paths.items():
        for method, operation in _object(operations).items():
            _add(_object(operation), table.get((method.upper(), path), Answers()), problems)
    components = _object(document.setdefault("components", {}))
    schemas = _object(components.setdefault("schemas", {}))
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas.update(problems.schemas)
    if tokens:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        for path in ("/healthz", "/readyz"):
            _object(_object(paths[path])["get"])["security"] = []
    return document


def _add(operation: Json, answers: Answers, problems: Problems) -> None:
    responses = _object(operation["responses"])
    responses.pop("422", None)  # FastAPI's own form of it, which we never send
    codes = [*problems.everywhere, *answers.problems]
    codes += problems.with_json if "requestBody" in operation else ()
    codes += problems.with_parameters if operation.get("parameters") else ()
    if answers.parameters:
        parameters = operation.get("parameters", [])
        assert isinstance(parameters, list)
        operation["parameters"] = [*parameters, *answers.parameters]
    if answers.body is not None:
        operation["requestBody"] = answers.body
    by_status: dict[int, list[str]] = {}
    for code in sorted(set(codes)):
        by_status.setdefault(problems.status(code), []).append(code)
    for status, same_status in by_status.items():
        responses[str(status)] = problems.answer(status, same_status)
    for status, answer in answers.others.items():
        # One or the other content: a success as described here, or a problem beside another body.
        problem = _object(responses.get(str(status), {}))
        content = {**_object(problem.get("content", {})), **_object(answer.get("content", {}))}
        responses[str(status)] = {**problem, **answer} | ({"content": content} if content else {})
    operation["responses"] = dict(sorted(responses.items()))


def _object(value: object) -> Json:
    assert isinstance(value, dict)
    return value
