"""Holds answers against `/openapi.json`: what a route answers must stand there, its problems by their codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
#: Answered before a route is found; the routes themselves cannot tell of it.
NO_ROUTE = {"unknown_route", "method_not_allowed"}


def check_documented(document: Mapping[str, Any], method: str, path: str, status: int, type_: str, body: bytes) -> None:
    """Raise unless this answer is one that the document names."""
    code = code_of(body) if type_.partition(";")[0] in ("application/problem+json", "application/json") else None
    operation = operation_of(document, method, path)
    if code in NO_ROUTE or operation is None:
        return
    told = operation["responses"].get(str(status))
    where = f"{method} {path}: {status} {code or type_}"
    assert told is not None, f"{where} is not in /openapi.json; add it to the table in route_answers.py"
    types = told.get("content", {})
    assert not body or type_.partition(";")[0] in types, f"{where}: /openapi.json has {sorted(types)}"
    if code is not None and status >= 400:
        assert code in codes_in(told), f"{where} is not in /openapi.json; add it to the table in route_answers.py"


def code_of(body: bytes) -> str | None:
    """The code of a problem or of an error as the OpenAI interface tells it."""
    found = json.loads(body) if body else None
    error = found.get("error", found) if isinstance(found, dict) else None
    return error.get("code") if isinstance(error, dict) else None


def operation_of(document: Mapping[str, Any], method: str, path: str) -> dict[str, Any] | None:
    """The route that a path leads to; HEAD is answered as GET."""
    wanted = "get" if method == "HEAD" else method.lower()
    for template, operations in document["paths"].items():
        if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template)), path.partition("?")[0]):
            found: dict[str, Any] | None = operations.get(wanted)
            return found
    return None


def codes_in(told: object) -> set[str]:
    """Every code that part of a document names."""
    if isinstance(told, dict):
        named = set(told["code"].get("enum", ())) if isinstance(told.get("code"), dict) else set()
        return named.union(*(codes_in(value) for value in told.values()))
    return set().union(*(codes_in(item) for item in told)) if isinstance(told, list) else set()


def schemathesis(url: str, folder: Path, arguments: Sequence[str] = ()) -> None:
    """Run schemathesis over a server's document; a finding fails the test, a machine without schemathesis skips it."""
    program = shutil.which("schemathesis")
    if program is None:
        pytest.skip("schemathesis is not installed; see CONTRIBUTING.md")
    for part in ("schemathesis.toml", "scripts/schemathesis_hooks.py"):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / part, folder / part)
    options = ["--max-examples", os.environ.get("SCHEMATHESIS_EXAMPLES", "15"), "--seed", "1", "--no-color"]
    command = [program, "run", f"{url}/openapi.json", *options, "--continue-on-failure", *arguments]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, "\n".join(line[:500] for line in (ran.stdout + ran.stderr).splitlines()[-200:])
