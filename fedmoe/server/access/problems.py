"""Errors as RFC 9457 problems: the HTTP status of every code, and the exception handlers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fedmoe.lora.safetensors_bytes import CodecError, MalformedError
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.journal import NotOwnerError
from fedmoe.wire.contract.messages import PROBLEM, VISIBLE, Problem
from fedmoe.wire.http.middleware import allowed

_log = structlog.get_logger("fedmoe.http")

#: Code of a refusal -> HTTP status. Every code the coordinator can raise stands here; a test holds the table.
STATUS: dict[str, int] = {
    "unauthorised": 401,
    "forbidden": 403,
    "cross_site": 403,
    "host_not_allowed": 421,
    "unknown_expert": 404,
    "unknown_token": 404,
    "unknown_worker": 404,
    "no_statistics": 404,
    "gateway_disabled": 404,
    "gateway_not_initialised": 404,
    "gateway_not_published": 404,
    "gate_disabled": 404,
    "unknown_candidate": 404,
    "not_acceptable": 406,
    "candidates_closed": 409,
    "unknown_version": 409,
    "too_stale": 409,
    "sequence_reused": 409,
    "other_history": 409,
    "update_rejected": 409,
    "lease_held": 409,
    "lease_lost": 409,
    "not_held": 409,
    "base_mismatch": 409,
    "lora_mismatch": 409,
    "start_mismatch": 409,
    "retired": 409,
    "name_taken": 409,
    "too_many_experts": 409,
    "too_many_statistics": 429,
    "expert_too_large": 409,
    "folded": 409,
    "nothing_to_retract": 409,
    "history_pruned": 410,
    "held_lost": 410,
    "too_large": 413,
    "upgrade_required": 426,
    "unsupported_type": 415,
    "rule_mismatch": 409,
    "token_revoked": 409,
    "token_mismatch": 409,
    "join_line_used": 409,
    "norm_too_large": 422,
    "statistics_mismatch": 422,
    "scores_mismatch": 422,
    "not_finite": 422,
    "invalid_request": 422,
    "malformed": 400,
    "digest_mismatch": 400,
    "truncated": 400,
    "too_slow": 408,
    "gave_way": 408,
    "json_busy": 429,
    "quota_exceeded": 429,
    "too_many_requests": 429,
    "too_soon": 429,
    "quarantine_full": 429,
    "busy": 503,
    "blobs_unavailable": 503,
    "no_owner": 503,
    "disk_full": 507,
}
_MAX_DETAIL = 2000
#: Seconds after which a refusal may have passed.
RETRY_AFTER = {
    "busy": "2",
    "blobs_unavailable": "5",
    "too_many_statistics": "600",
    "json_busy": "5",
    "quarantine_full": "60",
    "disk_full": "30",
}


def problem(code: str, status: int, detail: str, fix: str = "", **facts: object) -> Response:
    """An RFC 9457 problem."""
    headers = {"Retry-After": RETRY_AFTER[code]} if code in RETRY_AFTER else {}
    if "retry_after" in facts:
        headers["Retry-After"] = str(facts["retry_after"])
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    content = json.dumps(_content(code, status, detail, fix, facts), allow_nan=False)
    return Response(content, status, headers, PROBLEM)


def _content(code: str, status: int, detail: str, fix: str, facts: Mapping[str, object]) -> dict[str, object]:
    # What a sender wrote comes back in it: cut short, and without half surrogate pairs, which no UTF-8 holds.
    cut = detail if len(detail) <= _MAX_DETAIL else detail[:_MAX_DETAIL] + "..."
    inert, title = cut.encode("utf-8", "backslashreplace").decode(), HTTPStatus(status).phrase
    return Problem(title=title, status=status, code=code, detail=inert, fix=fix, **facts).model_dump()  # type: ignore[arg-type]


def refusal(error: RefusedError) -> Response:
    """The problem that a refusal is."""
    return problem(error.code, STATUS[error.code], error.detail, error.fix, **error.facts)


def as_json(error: RefusedError) -> dict[str, object]:
    """The same as JSON types, for an answer whose body is something else."""
    return _content(error.code, STATUS[error.code], error.detail, error.fix, error.facts)


def not_decoded(error: CodecError) -> Response:
    """The problem that a body is which cannot be read."""
    status = 400 if isinstance(error, MalformedError) else 422
    return problem(error.code, status, str(error), "Nothing was stored.")


def storage_failed(error: StorageFailedError) -> Response:
    """The problem of a disk or database on which nothing can be promised; it is logged."""
    _log.error("storage_failed", reason=str(error))
    return problem("storage_failed", 503, f"{error}.", "The coordinator stops; its operator has to look.")


def no_owner(reason: str) -> RefusedError:
    """The refusal while no replica owns the federation, or the owner has just changed."""
    return RefusedError("no_owner", f"{reason}.", "Send it again after the time given.", retry_after=1)


def install(app: FastAPI) -> None:
    """Answer every error as a problem; unknown ones are logged and say nothing of our insides."""

    @app.exception_handler(RefusedError)
    async def _refused(request: Request, error: RefusedError) -> Response:
        return refusal(error)

    @app.exception_handler(CodecError)
    async def _codec(request: Request, error: CodecError) -> Response:
        return not_decoded(error)

    @app.exception_handler(StorageFailedError)
    async def _storage(request: Request, error: StorageFailedError) -> Response:
        return storage_failed(error)

    @app.exception_handler(NotOwnerError)
    async def _not_owner(request: Request, error: NotOwnerError) -> Response:
        return refusal(no_owner(str(error)))

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return _invalid_request(request, error.errors()[0])

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        codes = {400: "malformed", 404: "unknown_route", 405: "method_not_allowed", 413: "too_large"}
        code = codes.get(error.status_code, "http_error")
        response = problem(code, error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}.")
        response.headers.update(allowed(request, error.headers))
        return response

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> Response:
        _log.error("unexpected", path=request.url.path, error=repr(error))
        return problem("internal_error", 500, "an unexpected error; the coordinator's log has it.")


def _invalid_request(request: Request, first: Mapping[str, Any]) -> Response:
    """The first thing that is wrong with a request's parameters or JSON body, as pydantic tells it."""
    if first["type"] == "json_invalid":
        return problem("malformed", 400, f"the body is not JSON: {first['ctx']['error']}.")
    content_type = request.headers.get("content-type", "")
    if first["loc"] == ("body",) and "json" not in content_type.lower():
        got = content_type[:80] or "no Content-Type"
        return problem("unsupported_type", 415, f"a body is sent as application/json, got {got}.")
    where = ".".join(str(part)[:80] for part in first["loc"][1:]) or "body"
    shown = repr(first.get("input"))[:80]
    unseen = first["type"] == "string_pattern_mismatch" and first["ctx"]["pattern"] == VISIBLE
    wrong = "only characters that can be seen are taken" if unseen else first["msg"]
    return problem("invalid_request", 422, f"{where}: {wrong}, got {shown}.", "See /openapi.json.")
