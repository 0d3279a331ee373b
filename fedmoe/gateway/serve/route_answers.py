"""Documented error codes and responses of the gateway server's routes, for `/openapi.json`."""

from __future__ import annotations

from collections.abc import Mapping

from fedmoe.gateway.serve.problems import STATUS
from fedmoe.wire.http.openapi import Answers, Json, Problems, Route

_TEXT: Json = {"schema": {"type": "string"}}
_ERROR: Json = {
    "type": "object",
    "description": "An error as the OpenAI interface tells it; `code` is for programs.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_OBJECT: Json = {"schema": {"type": "object"}}
_STATE: Json = {"application/json": {"schema": {"type": "object", "required": ["status"]}}}
_ANSWER: dict[int, Json] = {
    200: {
        "description": "the answer, or with stream: true its pieces as server-sent events",
        "headers": dict.fromkeys(("X-FedMoE-Model", "X-FedMoE-Version", "X-FedMoE-Digest"), _TEXT),
        "content": {"application/json": _OBJECT, "text/event-stream": _TEXT},
    }
}
_GENERATION_CODES = (
    *("model_not_found", "context_length_exceeded", "invalid_value", "unknown_parameter", "one_prompt_only"),
    *("empty_prompt", "invalid_messages", "invalid_token", "no_chat_template"),
    *("server_busy", "generation_failed", "routed_model_missing"),
)

ANSWERS: Mapping[Route, Answers] = {
    ("GET", "/healthz"): Answers(),
    ("GET", "/readyz"): Answers(others={503: {"description": "not ready, with the reason", "content": _STATE}}),
    ("GET", "/metrics"): Answers(
        others={200: {"description": "counters in the text format of Prometheus", "content": {"text/plain": _TEXT}}}
    ),
    ("GET", "/v1/models"): Answers(),
    ("GET", "/v1/models/{name}"): Answers(("model_not_found",)),
    ("POST", "/v1/chat/completions"): Answers(_GENERATION_CODES, _ANSWER),
    ("POST", "/v1/completions"): Answers(_GENERATION_CODES, _ANSWER),
}


def _answer(status: int, codes: list[str]) -> Json:
    named = {"properties": {"error": {"properties": {"code": {"enum": codes}}}}}
    documented: Json = {
        "description": f"an error with the code {', '.join(codes)}",
        "content": {"application/json": {"schema": {"allOf": [{"$ref": "#/components/schemas/Error"}, named]}}},
    }
    if status == 429:
        documented["headers"] = {"Retry-After": _TEXT}
    return documented


PROBLEMS = Problems(
    status=STATUS.__getitem__,
    answer=_answer,
    schemas={"Error": _ERROR},
    everywhere=(
        "no_api_key",
        "invalid_api_key",
        "cross_site",
        "host_not_allowed",
        "internal_error",
        "malformed",
        "not_acceptable",
    ),
    with_json=("too_slow", "too_large", "unknown_parameter", "invalid_value"),
    with_parameters=(),
)
