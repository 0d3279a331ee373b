"""Objects that the route handlers of one application share, kept in `request.app.state`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from fedmoe.coordinator import GatewayPlan
from fedmoe.server.access.security import Principal, principal_of
from fedmoe.server.access.tokens import TokenGate
from fedmoe.server.access.uploads import PushPace, UploadPlaces
from fedmoe.server.expert_names import resolve_expert
from fedmoe.server.routes.coordinator_metrics import CoordinatorMetrics
from fedmoe.server.routes.weight_responses import WeightAnswers
from fedmoe.server.service import CoordinatorService
from fedmoe.wire.contract.messages import INCARNATION_HEADER, Message
from fedmoe.wire.contract.replicas import OwnerInfo
from fedmoe.wire.http.live import LiveStates
from fedmoe.wire.http.middleware import with_header


class ExpertMessage(Protocol):
    """A request about one expert."""

    @property
    def expert(self) -> str: ...

    def model_copy(self, *, update: dict[str, str]) -> Self: ...


ExpertMessageT = TypeVar("ExpertMessageT", bound=ExpertMessage)
AnswerT = TypeVar("AnswerT", bound=Message)


@dataclass
class AppState:
    """The service, its tokens, the writer of weights, what uploads pass, metrics; the gateway as last listed.

    `owners` reads who owns what, where there are several coordinators.
    """

    service: CoordinatorService
    tokens: TokenGate
    answers: WeightAnswers
    places: UploadPlaces
    pace: PushPace
    metrics: CoordinatorMetrics
    owners: Callable[[], Sequence[OwnerInfo]]
    live: LiveStates[Principal]
    listed_gateway: tuple[GatewayPlan, str] | None = None


def parts_of(request: Request) -> AppState:
    parts = request.app.state.parts
    assert isinstance(parts, AppState), "create_app sets them"
    return parts


def service_of(request: Request) -> CoordinatorService:
    return parts_of(request).service


def with_first_name(request: Request, message: ExpertMessageT) -> ExpertMessageT:
    """The request with the first name of its expert, which the token must be allowed to use."""
    first = resolve_expert(service_of(request).coordinator.experts, principal_of(request), message.expert)
    return message.model_copy(update={"expert": first})


def with_incarnation(request: Request, answer: AnswerT) -> AnswerT:
    """The answer with the history it is of, where its caller takes that."""
    name = service_of(request).current.incarnation if answers_with_new_keys(request.headers) else None
    return answer.model_copy(update={"incarnation": name})


def answers_with_new_keys(headers: Mapping[str, str]) -> bool:
    """Whether a caller takes keys in an answer that it may not know.

    Workers from before there were protocol numbers refuse them. They are known by their HTTP library, which names
    itself where they do not; the header of every answer tells them no less.
    """
    return "fedmoe-protocol" in headers or not headers.get("user-agent", "").startswith("python-httpx")


class IncarnationHeader:
    """Every answer says which history it is of, in a header, so that weights stay the same bytes in all of them."""

    def __init__(self, app: ASGIApp, incarnation: str) -> None:
        self._app = app
        self._incarnation = incarnation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = scope["type"] == "http"
        await self._app(scope, receive, with_header(send, INCARNATION_HEADER, self._incarnation) if http else send)
