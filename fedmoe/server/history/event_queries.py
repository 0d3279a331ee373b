"""Queries over the events of one expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedmoe.federation.events import Event, ExpertRegistered, GatewayMerged, VersionEvent
from fedmoe.federation.lineage import Lineage, start


def made_version(event: Event) -> int:
    """The version that an event of an expert made."""
    return event.version if isinstance(event, VersionEvent) else 0


def registration(events: Iterable[Event]) -> ExpertRegistered:
    """An expert's first event."""
    registered = next(iter(events))
    assert isinstance(registered, ExpertRegistered), "an expert's first event is its registration"
    return registered


def left_in_the_gateway(
    chains: Mapping[int, Lineage | None], folds: Iterable[GatewayMerged], expert: str, worker: str
) -> str:
    """What of a worker's updates cannot be taken out of ONE expert, in words; nothing where all can.

    It is what the expert held when it was folded into the gateway, by its newest version in `chains` or before.
    """
    left, newest = start(chains[max(chains)]), max(chains)
    versions = (fold.sources[expert] for fold in folds if fold.sources.get(expert, newest) < newest)
    gone = any(update.worker == worker for version in versions for update in Lineage.updates(chains[version]))
    if left is None or not gone:
        return ""
    return f"What {worker!r} gave before the expert went on as version {left.version} stays in the gateway."
