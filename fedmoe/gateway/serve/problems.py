"""Error responses of the OpenAI interface: `{"error": {"message", "type", "param", "code"}}` with a status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from fedmoe.inference.backend import BackendError
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.http.middleware import allowed

_log = structlog.get_logger("fedmoe.serve")

#: Code of an error -> HTTP status.
STATUS = {
    "no_api_key": 401,
    "invalid_api_key": 401,
    "cross_site": 403,
    "host_not_allowed": 421,
    "internal_error": 500,
    "malformed": 400,
    "invalid_value": 400,
    "unknown_parameter": 400,
    "too_slow": 408,
    "too_large": 413,
    "model_not_found": 404,
    "not_acceptable": 406,
    "context_length_exceeded": 400,
    "one_prompt_only": 400,
    "empty_prompt": 400,
    "invalid_messages": 400,
    "invalid_token": 400,
    "no_chat_template": 400,
    "server_busy": 429,
    "generation_failed": 500,
    "routed_model_missing": 503,
    "upgrade_required": 426,
    "unknown_route": 404,
    "method_not_allowed": 405,
}
_SHOWN = 300


class ApiError(Exception):
    """A refusal or failure as the client sees it; `param` names the wrong field, `retry_after` is in seconds.

    The `status` is that of the `code`; only a code that is not in the table has one of its own.
    """

    def __init__(
        self, code: str, message: str, param: str | None = None, retry_after: int | None = None, status: int = 500
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.status = code, message, STATUS.get(code, status)
        self.param, self.retry_after = param, retry_after

    def body(self) -> dict[str, object]:
        """The JSON of the error."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        message = self.message.encode("utf-8", "backslashreplace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def refusal(error: RefusedError) -> Response:
    """The answer to a request that one of the guards refuses."""
    return ApiError(error.code, str(error)).response()


def too_long(got: str, most: int, param: str) -> ApiError:
    """A prompt above the limit."""
    return ApiError(
        "context_length_exceeded", f"a prompt may have {most} tokens here, got {got}; send a shorter one", param
    )


def of_backend(error: BackendError) -> ApiError:
    """A generation that failed: nothing the client did."""
    return ApiError("generation_failed", str(error))


def install(app: FastAPI) -> None:
    """Answer every error in this form; unknown ones are logged and say nothing of our insides."""
    app.add_exception_handler(ApiError, _handler(ApiError.response))
    app.add_exception_handler(BackendError, _handler(lambda error: of_backend(error).response()))
    app.add_exception_handler(RefusedError, _handler(refusal))
    app.add_exception_handler(
        RequestValidationError, _handler(lambda error: _invalid_request(error.errors()[0]).response())
    )

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        codes = {400: "malformed", 404: "unknown_route", 405: "method_not_allowed"}
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        code = codes.get(error.status_code, "http_error")
        response = ApiError(code, message, status=error.status_code).response()
        response.headers.update(allowed(request, error.headers))
        return response

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> Response:
        _log.error("unexpected", path=request.url.path, error=repr(error))
        return ApiError("internal_error", "an unexpected error; the server's log has it").response()


def _handler(answer: Callable[[Any], Response]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        return answer(error)

    return handle


def _invalid_request(first: Mapping[str, object]) -> ApiError:
    """The first thing that is wrong with a body, as pydantic tells it."""
    if first["type"] == "json_invalid":
        return ApiError("malformed", f"the body is not JSON: {first['msg']}")
    place = first["loc"]
    assert isinstance(place, tuple)
    names = [str(part)[:80] for part in place[1:]]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "value_error" and not names:
        return ApiError("invalid_value", message)
    if not names:
        return ApiError("malformed", "the body must be a JSON object, sent as application/json")
    where, param = ".".join(names), names[0]
    if first["type"] == "extra_forbidden":
        return ApiError("unknown_parameter", f"{where} is not supported here; leave it out", param)
    return ApiError("invalid_value", f"{where}: {message}, got {repr(first.get('input'))[:_SHOWN]}", param)
