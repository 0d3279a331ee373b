"""The status of a federation, as far as a token may see it: what `GET /status`, the page and `fedmoe status` show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedmoe import __version__
from fedmoe.experts import ExpertModel
from fedmoe.server.access.security import Principal
from fedmoe.server.expert_names import may_use
from fedmoe.server.service import CoordinatorService
from fedmoe.server.status.heartbeats import state_of
from fedmoe.wire.contract.experts import WorkerInfo
from fedmoe.wire.contract.status import (
    DiskStatus,
    EventInfo,
    ExpertStatus,
    GatewayStatus,
    Heartbeat,
    PushTotals,
    StatusInfo,
    WorkerStatus,
)


def federation_status(service: CoordinatorService, principal: Principal) -> StatusInfo:
    """Everything at this moment; a worker's token sees its own experts, of their workers those that it may be."""
    now, experts = service.now, service.coordinator.experts
    readable = sorted(
        (expert for expert in experts.values() if may_use(principal, expert)), key=lambda expert: expert.title
    )
    heard = service.heartbeats.by_expert(now)
    statuses = (_workers(service, expert, heard.get(expert.name, {}), now) for expert in readable)
    workers = [status for of_expert in statuses for status in of_expert if _own(principal, status)]
    whole = principal.sees_all
    return StatusInfo(
        at=now,
        role=principal.role,
        revision=service.activity.revision + service.heartbeats.count,
        fedmoe=__version__,
        incarnation=service.current.incarnation,
        problem=service.not_ready,
        experts=[_expert(service, expert, now) for expert in readable],
        workers=workers,
        gateway=_gateway(service),
        gate=service.evaluation_gate.info() if service.evaluation_gate is not None else None,
        held_updates=len(service.coordinator.quarantine.held),
        disk=_disk(service, now) if whole else None,
        events=_events(service, readable, principal),
    )


def _own(principal: Principal, status: WorkerStatus) -> bool:
    return principal.sees_all or principal.worker in (None, status.worker)


def _workers(
    service: CoordinatorService, expert: ExpertModel, heard: Mapping[str, tuple[Heartbeat, float]], now: float
) -> list[WorkerStatus]:
    """Everybody who pushed to an expert or said that it trains it, in name order."""
    pushed = {info.worker: info for info in service.roster.workers(expert.name, now, held_out=True)}
    return [
        _worker(service, expert, name, pushed.get(name), heard.get(name), now) for name in sorted({*pushed, *heard})
    ]


def _worker(
    service: CoordinatorService,
    expert: ExpertModel,
    name: str,
    info: WorkerInfo | None,
    heard: tuple[Heartbeat, float] | None,
    now: float,
) -> WorkerStatus:
    refused, refusal = service.activity.refusals(expert.name, name)
    totals = PushTotals(
        landed=info.updates if info else 0,
        held=service.activity.held(expert.name, name),
        refused=refused,
        refusal=refusal,
    )
    status = WorkerStatus(
        expert=expert.title,
        worker=name,
        state=None,
        step=info.steps if info else None,
        loss=info.loss if info else None,
        held_out=info.held_out if info else None,
        staleness=info.staleness if info else None,
        heard_at=now - info.seconds_ago if info else 0.0,
        pushes=totals,
    )
    if heard is None:
        return status
    heartbeat, at = heard
    state = state_of(heartbeat, at, now)
    # Of one that is silent or gone nobody knows a pace.
    rate, pace, left = heartbeat.steps_per_second, None, None
    if state == "training":
        pace = heartbeat.tokens_per_second
        left = max(0, heartbeat.steps - heartbeat.step) / rate if heartbeat.steps is not None and rate else None
    return status.model_copy(
        update={
            "state": state,
            "phase": heartbeat.phase,
            "step": heartbeat.step,
            "steps": heartbeat.steps,
            "seconds_left": left,
            "tokens_per_second": pace,
            "loss": status.loss if heartbeat.loss is None else heartbeat.loss,
            "device": heartbeat.device,
            "memory": heartbeat.memory,
            "device_memory": heartbeat.device_memory,
            "device_total": heartbeat.device_total,
            "heard_at": max(at, status.heard_at),
        }
    )


def _expert(service: CoordinatorService, expert: ExpertModel, now: float) -> ExpertStatus:
    rate, staleness = service.activity.rate(expert.name, now)
    gate = service.evaluation_gate
    return ExpertStatus(
        name=expert.title,
        version=expert.version,
        retired=expert.retired,
        workers=service.roster.count(expert.name),
        updates_per_minute=round(rate, 2),
        staleness=staleness,
        gain_kept=gate.kept.get(expert.name) if gate is not None else None,
        losses=service.activity.losses(expert.name),
    )


def _gateway(service: CoordinatorService) -> GatewayStatus | None:
    if not (service.coordinator.aggregation.enable_gateway and service.coordinator.active and service.has_gateway):
        return None
    gateway = service.gateway_plan()
    return GatewayStatus(version=gateway.version, strategy=gateway.strategy, sources=dict(gateway.sources))


def _disk(service: CoordinatorService, now: float) -> DiskStatus | None:
    if service.retention is None:
        return None
    usage, pace = service.retention.usage(), service.activity.bytes_per_hour(now)
    left = usage.free / pace if usage.free is not None and pace > 0 else None
    return DiskStatus(stored=usage.stored, free=usage.free, bytes_per_hour=pace, hours_left=left)


def _events(service: CoordinatorService, readable: Iterable[ExpertModel], principal: Principal) -> list[EventInfo]:
    """Events of experts that may be seen, under their newest names, and of a worker's own updates only."""
    titles = {expert.name: expert.title for expert in readable}
    whole = principal.sees_all
    shown = []
    for event in service.activity.events():
        other = event.worker and principal.worker not in (None, event.worker)
        if whole or (event.expert in titles and not other):
            shown.append(event.model_copy(update={"expert": titles.get(event.expert, event.expert)}))
    return shown
