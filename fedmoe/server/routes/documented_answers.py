"""Documented responses of every route, errors included, for `/openapi.json`; a test checks responses against it."""

from __future__ import annotations

from collections.abc import Mapping

from fedmoe.server.access.problems import RETRY_AFTER, STATUS
from fedmoe.wire.contract.messages import PROBLEM, SAFETENSORS, Problem
from fedmoe.wire.http.openapi import Answers, Json, Problems, Route

#: Codes that are not raised as a `RefusedError`: of the codec, and of the handlers of `problems`.
OTHER_STATUS = {
    "duplicate_key": 400,
    "shape_mismatch": 422,
    "rank_mismatch": 422,
    "tensor_mismatch": 422,
    "dtype_not_accepted": 422,
    "format": 422,
    "version": 422,
    "storage_failed": 503,
    "internal_error": 500,
}

_BINARY: Json = {"schema": {"type": "string", "format": "binary"}}
_MATRIX: Json = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
_TEXT: Json = {"schema": {"type": "string"}}
_WEIGHTS: Json = {
    "type": "object",
    "description": "Weights as JSON, with what safetensors have as metadata.",
    "required": ["version", "digest", "modules"],
    "properties": {
        "version": {"type": "integer"},
        "digest": {"type": "string"},
        "modules": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["lora_A", "lora_B"],
                "properties": {"lora_A": _MATRIX, "lora_B": _MATRIX},
            },
        },
    },
}
_JSON_WEIGHTS: Json = {"schema": {"$ref": "#/components/schemas/WeightsAsJson"}}
_WEIGHT_CONTENT: Json = {SAFETENSORS: _BINARY, "application/json": _JSON_WEIGHTS}
_WEIGHT_ANSWERS: dict[int, Json] = {
    200: {
        "description": "the weights, as safetensors where Accept names them, else as JSON",
        "headers": dict.fromkeys(("ETag", "FedMoE-Version", "FedMoE-Digest", "Content-Digest"), _TEXT),
        "content": _WEIGHT_CONTENT,
    },
    304: {"description": "the caller has these weights in this form", "headers": {"ETag": _TEXT}},
}
_PUSH_CONTENT: Json = {
    SAFETENSORS: _BINARY,
    "application/json": {"schema": {"anyOf": [{"$ref": "#/components/schemas/UpdateResult"}, _JSON_WEIGHTS["schema"]]}},
}
_EVENTS: Json = {"text/event-stream": {"schema": {"type": "string"}}}
_STATE: Json = {"application/json": {"schema": {"type": "object", "required": ["status"]}}}
_AS_JSON = ("json_busy",)
_GATEWAY = ("gateway_disabled", "gateway_not_initialised", "gateway_not_published")
_WRITES = ("storage_failed", "disk_full", "blobs_unavailable")
_BODY = ("digest_mismatch", "truncated", "too_slow", "too_large", "unsupported_type", "duplicate_key")
_TENSORS = ("shape_mismatch", "rank_mismatch", "tensor_mismatch", "dtype_not_accepted", "format", "not_finite")
_OWN = ("forbidden", "unknown_expert")
_DIGEST: Json = {
    "name": "Content-Digest",
    "in": "header",
    "required": True,
    "description": "sha256 of the body (RFC 9530).",
    "schema": {"type": "string", "pattern": "^sha-256=:[A-Za-z0-9+/]{43}=:$"},
}
_SAFETENSORS_BODY: Json = {"required": True, "content": {SAFETENSORS: _BINARY}}

ANSWERS: Mapping[Route, Answers] = {
    ("GET", "/healthz"): Answers(others={503: {"description": "storage has failed", "content": _STATE}}),
    ("GET", "/readyz"): Answers(others={503: {"description": "not ready, with the reason", "content": _STATE}}),
    ("GET", "/metrics"): Answers(
        ("forbidden",),
        {200: {"description": "the state in the text format of Prometheus", "content": {"text/plain": _TEXT}}},
    ),
    ("GET", "/federation"): Answers(),
    ("GET", "/list_experts"): Answers(),
    ("GET", "/get_gateway_weights"): Answers((*_GATEWAY, *_AS_JSON), _WEIGHT_ANSWERS),
    ("GET", "/get_all_expert_weights"): Answers(("unknown_expert", *_AS_JSON), _WEIGHT_ANSWERS),
    ("POST", "/get_expert_weights"): Answers((*_OWN, *_AS_JSON), _WEIGHT_ANSWERS),
    ("GET", "/get_gateway_info"): Answers(_GATEWAY),
    ("GET", "/statistics"): Answers(_OWN),
    ("GET", "/data_statistics"): Answers(
        (*_OWN, "no_statistics", "blobs_unavailable"),
        {
            200: {"description": "the statistics of all workers, merged", "content": {SAFETENSORS: _BINARY}},
            304: {"description": "the caller has these statistics", "headers": {"ETag": _TEXT}},
        },
    ),
    ("POST", "/register_expert"): Answers(
        (
            *("forbidden", "base_mismatch", "lora_mismatch", "start_mismatch", "expert_too_large"),
            *("too_many_experts", "retired", *_WRITES),
        )
    ),
    ("POST", "/push_expert_update"): Answers(
        (
            *(*_OWN, *_BODY, *_TENSORS, *_WRITES, *_AS_JSON, "busy", "gave_way", "norm_too_large", "invalid_request"),
            *("unknown_version", "too_stale", "sequence_reused", "other_history", "update_rejected", "quarantine_full"),
            *("too_soon", "quota_exceeded", "lease_held", "lease_lost", "retired"),
        ),
        {
            200: {
                "description": "what became of it; with answer=weights the newest weights, the result in FedMoE-Result",
                "content": _PUSH_CONTENT,
            },
            202: {"description": "held for an administrator; the expert has not changed", "content": _PUSH_CONTENT},
            409: {"content": _WEIGHT_CONTENT},
        },
        (_DIGEST,),
        _SAFETENSORS_BODY,
    ),
    ("POST", "/push_statistics"): Answers((*_OWN, *_WRITES, "retired", "too_many_statistics")),
    ("POST", "/push_data_statistics"): Answers(
        (
            *(*_OWN, *_BODY, *_TENSORS, *_WRITES, "busy", "gave_way", "quota_exceeded", "statistics_mismatch"),
            *("invalid_request", "retired", "too_many_statistics", "version"),
        ),
        {},
        (_DIGEST,),
        _SAFETENSORS_BODY,
    ),
    ("GET", "/gateway_candidates"): Answers((*_OWN, "gate_disabled")),
    ("POST", "/gateway_candidates"): Answers((*_OWN, "gate_disabled", "busy")),
    ("GET", "/gateway_candidate_weights"): Answers(
        ("forbidden", "gate_disabled", "unknown_candidate", "candidates_closed", *_AS_JSON), _WEIGHT_ANSWERS
    ),
    ("POST", "/push_gateway_scores"): Answers(
        (*_OWN, "gate_disabled", "candidates_closed", "scores_mismatch", "busy", *_WRITES)
    ),
    ("GET", "/gateway_verdicts"): Answers(("gate_disabled",)),
    ("POST", "/rename_expert"): Answers((*_OWN, "name_taken", *_WRITES)),
    ("POST", "/retire_expert"): Answers((*_OWN, *_WRITES)),
    ("POST", "/unretire_expert"): Answers((*_OWN, "base_mismatch", "lora_mismatch", *_WRITES)),
    ("POST", "/rollback"): Answers(
        (*_OWN, "unknown_version", "history_pruned", "folded", "other_history", "not_finite", *_WRITES)
    ),
    ("POST", "/retract"): Answers(
        (*_OWN, "nothing_to_retract", "history_pruned", "other_history", "not_finite", "busy", *_WRITES)
    ),
    ("GET", "/quarantine"): Answers(("forbidden",)),
    ("POST", "/quarantine/release"): Answers(
        (*_OWN, "not_held", "held_lost", "too_stale", "unknown_version", "not_finite", "retired", *_WRITES)
    ),
    ("POST", "/quarantine/reject"): Answers(("forbidden", "not_held", *_WRITES)),
    ("GET", "/tokens"): Answers(("forbidden",)),
    ("POST", "/tokens"): Answers(("forbidden", "token_revoked", "token_mismatch", *_WRITES)),
    ("POST", "/tokens/revoke"): Answers(("forbidden", "unknown_token", *_WRITES)),
    ("GET", "/live"): Answers(
        (),
        {200: {"description": "the status as server-sent events, whenever it changes", "content": _EVENTS}},
    ),
    ("POST", "/session"): Answers(("forbidden",)),
    ("POST", "/session/end"): Answers(),
    ("POST", "/heartbeat"): Answers(_OWN),
    ("GET", "/status"): Answers(),
    ("GET", "/worker_log"): Answers((*_OWN, "unknown_worker")),
    ("POST", "/join"): Answers(("forbidden", "join_line_used", "token_mismatch", *_WRITES)),
    ("GET", "/replicas"): Answers(("forbidden",)),
    ("GET", "/update_limit"): Answers((*_OWN, "too_soon", "lease_held", "lease_lost", "retired")),
    ("GET", "/data_statistics_limit"): Answers((*_OWN, "retired")),
}


def _answer(status: int, codes: list[str]) -> Json:
    named = {"type": "object", "properties": {"status": {"const": status}, "code": {"enum": codes}}}
    answer: Json = {
        "description": f"a problem with the code {', '.join(codes)}",
        "content": {PROBLEM: {"schema": {"allOf": [{"$ref": "#/components/schemas/Problem"}, named]}}},
    }
    if status == 429 or any(code in RETRY_AFTER for code in codes):
        answer["headers"] = {"Retry-After": _TEXT}
    return answer


PROBLEMS = Problems(
    status=lambda code: (OTHER_STATUS | STATUS)[code],
    answer=_answer,
    schemas={"Problem": Problem.model_json_schema(), "WeightsAsJson": _WEIGHTS},
    everywhere=(
        *("unauthorised", "forbidden", "cross_site", "host_not_allowed", "too_many_requests"),
        *("upgrade_required", "internal_error", "malformed", "not_acceptable", "no_owner"),
    ),
    with_json=("quota_exceeded", "busy", "too_slow", "too_large", "unsupported_type", "invalid_request"),
    with_parameters=("invalid_request",),
)
