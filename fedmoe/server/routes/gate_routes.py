"""HTTP routes of the evaluation gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeVar

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from fedmoe.experts import ExpertModel
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.security import Principal, principal_of
from fedmoe.server.expert_names import by_title, may_use, resolve_expert
from fedmoe.server.gate.candidates import CandidateSet
from fedmoe.server.gate.gate import EvaluationGate
from fedmoe.server.routes.weight_responses import WeightAnswers, adapter_weights
from fedmoe.server.service import CoordinatorService
from fedmoe.server.storage.verdicts import GatewayVerdict
from fedmoe.wire.contract.gate import (
    CandidateInfo,
    CandidatesAnswer,
    CandidateSetInfo,
    CandidatesRequest,
    CandidateWeightsRequest,
    GatewayScores,
    ScoresResult,
    VerdictInfo,
    VerdictsAnswer,
    VerdictsRequest,
)

EvaluatorRequest = TypeVar("EvaluatorRequest", CandidatesRequest, GatewayScores)


def gate_routes(app: FastAPI, service: CoordinatorService, answers: WeightAnswers) -> None:
    """Add the routes; without a gate they refuse."""

    @app.get("/gateway_candidates")
    def gateway_candidates(request: Request, wanted: Annotated[CandidatesRequest, Query()]) -> CandidatesAnswer:
        return _asked(service, _evaluators_own(request, service, wanted))

    @app.post("/gateway_candidates")
    def announce_evaluator(request: Request, wanted: CandidatesRequest) -> CandidatesAnswer:
        wanted = _evaluators_own(request, service, wanted)
        _gate(service).announce(wanted, principal_of(request).token)
        return _asked(service, wanted)

    @app.get("/gateway_candidate_weights")
    def gateway_candidate_weights(request: Request, wanted: Annotated[CandidateWeightsRequest, Query()]) -> Response:
        offer, adapter, expert = _gate(service).adapter(wanted.set, wanted.digest)
        if expert is not None:
            resolve_expert(service.coordinator.experts, principal_of(request), expert)
        weights = adapter_weights(offer.version, adapter, wanted.digest, offer.sources, offer.base)
        # Few ask for it and once each, so it is not kept.
        return answers.answer(request, weights, "fp32", keep=False)

    @app.post("/push_gateway_scores")
    def push_gateway_scores(request: Request, scores: GatewayScores) -> ScoresResult:
        scores = _evaluators_own(request, service, scores)
        return ScoresResult(waiting_for=_gate(service).take(scores, principal_of(request).token))

    @app.get("/gateway_verdicts")
    def gateway_verdicts(request: Request, wanted: Annotated[VerdictsRequest, Query()]) -> VerdictsAnswer:
        _gate(service)
        principal = principal_of(request)
        experts = service.coordinator.experts
        found = [_verdict_info(one, principal, experts) for one in service.journal.verdicts(wanted.limit)]
        return VerdictsAnswer(verdicts=found)


def _asked(service: CoordinatorService, wanted: CandidatesRequest) -> CandidatesAnswer:
    offer, left, status = _gate(service).ask(wanted)
    told = None if offer is None else _set_info(offer, wanted.expert, left, service.coordinator.experts)
    return CandidatesAnswer(open=told, status=status)


def _verdict_info(found: GatewayVerdict, principal: Principal, experts: Mapping[str, ExpertModel]) -> VerdictInfo:
    """A verdict with the scores of the experts that the asker's token may use."""
    told = {key: found.payload[key] for key in ("version", "reason", "kept", "scores")}
    published, undecided = found.payload["candidate"], found.payload.get("undecided", False)
    info = VerdictInfo.model_validate({**told, "at": found.at, "published": published, "undecided": undecided})
    scores = [
        one.model_copy(update={"expert": experts[one.expert].title})
        for one in info.scores
        if one.expert in experts and may_use(principal, experts[one.expert])
    ]
    kept = {candidate: by_title(domains, experts) for candidate, domains in info.kept.items()}
    return info.model_copy(update={"scores": scores, "kept": kept})


def _gate(service: CoordinatorService) -> EvaluationGate:
    if service.evaluation_gate is None:
        raise RefusedError(
            "gate_disabled", "this coordinator publishes every gateway.", "Start it with --evaluation-gate."
        )
    return service.evaluation_gate


def _evaluators_own(request: Request, service: CoordinatorService, wanted: EvaluatorRequest) -> EvaluatorRequest:
    """The request with the first name of its expert, if its token belongs to this evaluator and may use the expert."""
    principal = principal_of(request)
    principal.require_worker(wanted.evaluator)
    first = resolve_expert(service.coordinator.experts, principal, wanted.expert)
    return wanted.model_copy(update={"expert": first})


def _set_info(
    offer: CandidateSet, expert: str, seconds_left: float, experts: Mapping[str, ExpertModel]
) -> CandidateSetInfo:
    return CandidateSetInfo(
        id=offer.id,
        version=offer.version,
        sources=by_title(offer.sources, experts),
        own=offer.experts[expert].digest,
        published=offer.published.digest if offer.published is not None else None,
        candidates=[
            CandidateInfo(name=c.name, strategy=c.model.strategy, scale=c.scale, digest=c.model.digest)
            for c in offer.candidates
        ],
        seconds_left=max(0.0, seconds_left),
    )
