"""Audit middleware: logs every change, and every refusal for lack of permission."""

from __future__ import annotations

import json
import time
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmoe.server.access.authentication import address_of
from fedmoe.server.access.security import Principal
from fedmoe.server.access.tokens import TokenGate
from fedmoe.server.access.turns import Rate, spend
from fedmoe.server.storage.audit import AuditLog, Fact
from fedmoe.wire.contract.messages import PROBLEM

#: Refusals noted a second; more are counted, so that whoever knocks without end does not push out what was changed.
REFUSAL_RATE = Rate(2.0, 100)
#: Asked with a body, but nothing changes.
_READS = frozenset({"/get_expert_weights"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_PERMISSION = frozenset({401, 403, 421})
_SHOWN = 200


class AuditMiddleware:
    """Notes who (role, worker, token's label, address) asked for what (route, expert), and the outcome's code."""

    def __init__(self, app: ASGIApp, log: AuditLog, gate: TokenGate) -> None:
        self._app = app
        self._log = log
        self._gate = gate
        self._full_at = 0.0
        self._skipped = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        outcome = _AuditedAnswer(send)
        try:
            await self._app(scope, receive, outcome.send)
        finally:
            changes = scope["method"] not in _SAFE_METHODS and scope["path"] not in _READS
            if (changes and outcome.status < 300) or self._notes_refusal(changes, outcome.status):
                self._note(scope, outcome)

    def _notes_refusal(self, changes: bool, status: int) -> bool:
        if status < 300 or not (changes or status in _PERMISSION):
            return False
        full_at, wait = spend(REFUSAL_RATE, self._full_at, time.monotonic())
        if wait:
            self._skipped += 1
            return False
        self._full_at = full_at
        return True

    def _note(self, scope: Scope, outcome: _AuditedAnswer) -> None:
        principal = scope.get("state", {}).get("principal")
        facts: dict[str, Fact] = {"what": f"{scope['method']} {scope['path'][:_SHOWN]}", "outcome": outcome.code}
        facts |= {"status": outcome.status, "from": address_of(scope)}
        if isinstance(principal, Principal):
            facts |= {"role": principal.role, "token": principal.token[:12], "label": self._gate.label(principal.token)}
            facts |= {name: value[:_SHOWN] for name, value in principal.named.items()}
        if self._skipped:
            facts["refusals_not_noted"], self._skipped = self._skipped, 0
        self._log.write(**facts)


class _AuditedAnswer:
    """The status of an answer on its way out, and the code of its problem if it is one."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 499  # until there is an answer: the connection was closed
        self.code = "gone"
        self._reads = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.code = "ok" if self.status < 300 else str(self.status)
            self._reads = (b"content-type", PROBLEM.encode()) in message.get("headers", [])
        elif self._reads and message["type"] == "http.response.body":
            self._reads = False
            with suppress(ValueError, KeyError, TypeError):
                self.code = str(json.loads(message.get("body", b""))["code"])[:_SHOWN] or self.code
        await self._send(message)
