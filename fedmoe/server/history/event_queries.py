"""Questions to the events of one expert."""

from __future__ import annotations

from collections.abc import Iterable

from fedmoe.federation.events import (
    Event,
    ExpertRebased,
    ExpertRegistered,
    ExpertRolledBack,
    Lineage,
    UpdateAccepted,
    UpdateLost,
    WorkerRetracted,
    start,
)


def made_version(event: Event) -> int:
    """The version that an event of an expert made."""
    match event:
        case UpdateAccepted() | ExpertRolledBack() | WorkerRetracted() | ExpertRebased() | UpdateLost():
            return event.version
        case _:
            return 0


def registration(events: Iterable[Event]) -> ExpertRegistered:
    """An expert's first event."""
    registered = next(iter(events))
    assert isinstance(registered, ExpertRegistered), "an expert's first event is its registration"
    return registered


def left_in_the_gateway(events: Iterable[Event], newest: Lineage | None, worker: str) -> str:
    """What of a worker's updates cannot be retracted, in words; nothing where all can."""
    left = start(newest)
    own = {identity(e) for e in events if isinstance(e, UpdateAccepted) and e.worker == worker}
    if left is None or own <= set(map(identity, Lineage.updates(newest))):
        return ""
    return f"What {worker!r} gave before the expert went on as version {left.version} stays in the gateway."


def identity(update: UpdateAccepted) -> tuple[str, str, int]:
    """Names an update, once and for all."""
    return update.worker, update.epoch, update.sequence
