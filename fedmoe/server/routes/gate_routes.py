"""HTTP routes of the evaluation gate: candidates, scores, and verdicts as far as a token may see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from fedmoe.experts import ExpertModel
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.security import Principal, principal_of
from fedmoe.server.expert_names import by_title, may_use, resolve_expert
from fedmoe.server.gate.gate import EvaluationGate
from fedmoe.server.routes.app_state import parts_of, service_of, with_first_name
from fedmoe.server.routes.weight_responses import adapter_weights
from fedmoe.server.storage.records import GatewayVerdict
from fedmoe.wire.contract.experts import (
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

router = APIRouter()


@router.get("/gateway_candidates")
def gateway_candidates(request: Request, message: Annotated[CandidatesRequest, Query()]) -> CandidatesAnswer:
    principal_of(request).require_worker(message.evaluator)
    return _open_set(request, with_first_name(request, message))


@router.post("/gateway_candidates")
def announce_evaluator(request: Request, message: CandidatesRequest) -> CandidatesAnswer:
    principal_of(request).require_worker(message.evaluator)
    message = with_first_name(request, message)
    _gate(request).announce(message, principal_of(request).token)
    return _open_set(request, message)


@router.get("/gateway_candidate_weights")
def gateway_candidate_weights(request: Request, message: Annotated[CandidateWeightsRequest, Query()]) -> Response:
    offer, adapter, expert = _gate(request).adapter(message.set, message.digest)
    if expert is not None:
        resolve_expert(service_of(request).coordinator.experts, principal_of(request), expert)
    weights = adapter_weights(offer.version, adapter, message.digest, offer.sources, offer.base)
    # Few ask for it and once each, so it is not kept.
    return parts_of(request).answers.answer(request, weights, "fp32", keep=False)


@router.post("/push_gateway_scores")
def push_gateway_scores(request: Request, scores: GatewayScores) -> ScoresResult:
    principal_of(request).require_worker(scores.evaluator)
    scores = with_first_name(request, scores)
    return ScoresResult(waiting_for=_gate(request).take(scores, principal_of(request).token))


@router.get("/gateway_verdicts")
def gateway_verdicts(request: Request, message: Annotated[VerdictsRequest, Query()]) -> VerdictsAnswer:
    _gate(request)
    principal, service = principal_of(request), service_of(request)
    verdicts = service.journal.verdicts(message.limit)
    return VerdictsAnswer(
        verdicts=[_verdict_info(verdict, principal, service.coordinator.experts) for verdict in verdicts]
    )


def _gate(request: Request) -> EvaluationGate:
    gate = service_of(request).evaluation_gate
    if gate is None:
        raise RefusedError(
            "gate_disabled", "this coordinator publishes every gateway.", "Start it with --evaluation-gate."
        )
    return gate


def _open_set(request: Request, message: CandidatesRequest) -> CandidatesAnswer:
    offer, seconds_left, status = _gate(request).ask(message)
    if offer is None:
        return CandidatesAnswer(open=None, status=status)
    info = CandidateSetInfo(
        id=offer.id,
        version=offer.version,
        sources=by_title(offer.sources, service_of(request).coordinator.experts),
        own=offer.experts[message.expert].digest,
        published=offer.published.digest if offer.published is not None else None,
        candidates=[
            CandidateInfo(name=c.name, strategy=c.model.strategy, scale=c.scale, digest=c.model.digest)
            for c in offer.candidates
        ],
        seconds_left=max(0.0, seconds_left),
    )
    return CandidatesAnswer(open=info, status=status)


def _verdict_info(verdict: GatewayVerdict, principal: Principal, experts: Mapping[str, ExpertModel]) -> VerdictInfo:
    """A verdict with the scores of the experts that the caller's token may use."""
    payload = verdict.payload
    facts = {key: payload[key] for key in ("version", "reason", "kept", "scores")}
    facts |= {"at": verdict.at, "published": payload["candidate"], "undecided": payload.get("undecided", False)}
    info = VerdictInfo.model_validate(facts)
    scores = [
        score.model_copy(update={"expert": experts[score.expert].title})
        for score in info.scores
        if score.expert in experts and may_use(principal, experts[score.expert])
    ]
    retained = {candidate: by_title(domains, experts) for candidate, domains in info.kept.items()}
    return info.model_copy(update={"scores": scores, "kept": retained})
