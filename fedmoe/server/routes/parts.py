"""What the route handlers of one application share, found through `request.app.state`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request

from fedmoe.coordinator import GatewayModel
from fedmoe.server.access.security import principal_of
from fedmoe.server.access.tokens import TokenGate
from fedmoe.server.access.uploads import UploadAdmission
from fedmoe.server.expert_names import resolve_expert
from fedmoe.server.history.base_history import answers_with_new_keys
from fedmoe.server.routes.weight_responses import WeightAnswers
from fedmoe.server.service import CoordinatorService
from fedmoe.wire.contract.experts import ExpertInfo
from fedmoe.wire.contract.gateway import CandidatesRequest, GatewayScores
from fedmoe.wire.contract.messages import (
    ChangeResult,
    DataStatisticsHeader,
    FederationInfo,
    RetractRequest,
    RollbackRequest,
    StatisticRequest,
    UpdateHeader,
    UpdateResult,
)

ExpertRequestT = TypeVar(
    "ExpertRequestT",
    UpdateHeader,
    DataStatisticsHeader,
    StatisticRequest,
    RollbackRequest,
    RetractRequest,
    CandidatesRequest,
    GatewayScores,
)
HistoryAnswerT = TypeVar("HistoryAnswerT", ExpertInfo, FederationInfo, UpdateResult, ChangeResult)


@dataclass
class Parts:
    """The service, its tokens, the writer of weights, the places for uploads; the gateway as lists last showed it."""

    service: CoordinatorService
    tokens: TokenGate
    answers: WeightAnswers
    admission: UploadAdmission
    listed_gateway: tuple[GatewayModel, str] | None = None


def parts_of(request: Request) -> Parts:
    parts = request.app.state.parts
    assert isinstance(parts, Parts), "create_app sets them"
    return parts


def service_of(request: Request) -> CoordinatorService:
    return parts_of(request).service


def with_first_name(request: Request, message: ExpertRequestT) -> ExpertRequestT:
    """The request with the first name of its expert, which the token must be allowed to use."""
    first = resolve_expert(service_of(request).coordinator.experts, principal_of(request), message.expert)
    return message.model_copy(update={"expert": first})


def with_incarnation(request: Request, answer: HistoryAnswerT) -> HistoryAnswerT:
    """The answer with the history it is of, where its caller takes that."""
    name = service_of(request).current.incarnation if answers_with_new_keys(request.headers) else None
    return answer.model_copy(update={"incarnation": name})
