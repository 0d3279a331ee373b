"""Authorization: roles, and what a worker's token may do."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.requests import Request

from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.contract.administration import INVITE

#: The one route on which the token of a join line is taken.
JOIN_PATH = "/join"
#: All that a viewer may ask for.
VIEWER_PATHS = frozenset(
    {
        *("/", "/page.js", "/plotly.js", "/live", "/status", "/metrics", "/list_experts", "/get_gateway_info"),
        *("/gateway_verdicts", "/federation", "/worker_log", "/openapi.json", "/session", "/session/end"),
    }
)
#: In the state of a request that another replica passed on: that it did, and how many bytes of a body it has stored.
OF_PEER = "of_peer"
STORED_BYTES = "stored_bytes"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request comes from; `worker` and `experts` None mean any.

    `token` is the hash of the token that was shown, empty where none is asked for: there everybody is an administrator.
    `named` is what the request turns out to be about, for the audit log.
    """

    role: str
    worker: str | None = None
    experts: tuple[str, ...] | None = None
    token: str = ""
    named: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def require_path(self, path: str) -> None:
        """Refuse the token of a join line but where it is exchanged, a viewer's where more is done than look."""
        if self.role == "viewer" and path not in VIEWER_PATHS:
            raise _forbidden(f"a viewer's token does not open {path[:100]}.")
        if self.role == INVITE and path != JOIN_PATH:
            raise RefusedError(
                "forbidden",
                "this is the token of a join line, which is good for nothing else.",
                "Run `fedmoe join` with the line: it gets the worker a token of its own.",
            )

    def require_invite(self, worker: str) -> None:
        if self.role != INVITE:
            raise RefusedError(
                "forbidden",
                f"only the token of a join line can be exchanged, got one with role {self.role!r}.",
                "An administrator makes such a line with: fedmoe token create --join",
            )
        self.require_worker(worker)

    def require_admin(self, **named: str) -> None:
        self.named.update(named)
        if self.role != "admin":
            raise _forbidden(f"this needs an admin token, got one with role {self.role!r}.")

    @property
    def sees_all(self) -> bool:
        """Whether everything of the federation may be shown."""
        return self.role in ("admin", "viewer")

    def require_sight(self) -> None:
        """For what administrators and viewers may see, and no worker."""
        if not self.sees_all:
            raise _forbidden(f"this needs an admin or viewer token, got one with role {self.role!r}.")

    def require_worker(self, worker: str) -> None:
        self.named["worker"] = worker
        if self.worker is not None and worker != self.worker:
            raise _forbidden(f"this token belongs to worker {self.worker!r}, the request names {worker!r}.")

    def may_use(self, expert: str) -> bool:
        """Whether the expert is within this token's scope."""
        return self.experts is None or expert in self.experts

    def require_expert(self, expert: str) -> None:
        self.named["expert"] = expert
        if not self.may_use(expert):
            scope = ", ".join(self.experts or ())
            raise _forbidden(f"this token may use {scope}; the request names {expert!r}.")


def principal_of(request: Request) -> Principal:
    """Who sent a request that came through `GateMiddleware`."""
    principal = request.scope["state"]["principal"]
    assert isinstance(principal, Principal), "the gate runs before every route"
    return principal


def _forbidden(detail: str) -> RefusedError:
    return RefusedError("forbidden", detail, "Ask the coordinator's operator for a token with this scope.")
