from __future__ import annotations

import ast
import json
from pathlib import Path

import fedmoe
from fedmoe.gateway.serve.problems import STATUS as GATEWAY_STATUS
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.problems import STATUS, problem, refusal
from fedmoe.wire.contract.messages import Problem

PACKAGE = Path(fedmoe.__file__).parent
# Raised by the codec, pydantic or the guard's own words, and answered from this table or next to it.
NOT_RAISED_AS_REFUSAL = {"invalid_request"}
# What the client makes of a proxy's answer; no server of ours raises these.
OF_A_PROXY = {"proxy_authentication", "proxy_size_limit"}


def raised_codes() -> dict[str, list[str]]:
    """Code -> the files that raise a `RefusedError` with it; a code that is not a literal is an error.

    The gateway server has a table of its own.
    """
    files: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id not in ("RefusedError", "BodyRefusedError", "TooStaleError"):
                continue
            if isinstance(node.args[0], ast.Constant):
                files.setdefault(str(node.args[0].value), []).append(path.name)
            else:
                assert path.parent.name == "wire", f"{path}: a refusal needs a code that can be read in the source"
    return files


def test_every_code_that_is_raised_has_a_status_and_the_other_way_round() -> None:
    raised = raised_codes()
    assert len(raised) > 20
    answered = STATUS.keys() | OF_A_PROXY | GATEWAY_STATUS.keys()
    assert {code: files for code, files in raised.items() if code not in answered} == {}
    assert set(STATUS) - set(raised) <= NOT_RAISED_AS_REFUSAL


def test_no_status_is_a_success_and_only_storage_is_a_server_error() -> None:
    assert all(400 <= status < 600 for status in STATUS.values())
    assert {code for code, status in STATUS.items() if status >= 500} == {
        "blobs_unavailable",
        "busy",
        "disk_full",
        "no_owner",
    }


def test_a_refusal_says_what_is_wrong_what_to_do_and_the_facts() -> None:
    answer = refusal(RefusedError("too_stale", "3 versions behind.", "Pull.", newest_version=7))
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert json.loads(bytes(answer.body)) == {
        "type": "about:blank",
        "title": "Conflict",
        "status": 409,
        "code": "too_stale",
        "detail": "3 versions behind.",
        "fix": "Pull.",
        "newest_version": 7,
    }


def test_only_what_passes_by_itself_has_a_retry_after() -> None:
    later = {code for code in STATUS if "retry-after" in refusal(RefusedError(code, "x")).headers}
    assert later == {"blobs_unavailable", "busy", "disk_full", "json_busy", "quarantine_full", "too_many_statistics"}


def test_what_a_sender_wrote_comes_back_inert_and_short() -> None:
    """Fault 56."""
    answer = problem("malformed", 400, "\ud800 \u202e <script> \x1b[31m " + "x" * 10_000)
    text = bytes(answer.body).decode()
    assert text.isascii()
    assert text.isprintable()
    detail = Problem.model_validate_json(text).detail  # JSON with half a surrogate pair could not be read
    assert "<script>" in detail
    assert len(detail) < 2100
