"""How an event lies in the journal's table: columns to find it by, and all of it as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from fedmoe.events import (
    Event,
    ExpertRegistered,
    ExpertRolledBack,
    ExpertWentOn,
    GatewayFolded,
    UpdateAccepted,
    WorkerRetracted,
)
from fedmoe.manifest import Manifest

_KINDS: dict[str, type[Event]] = {
    "register": ExpertRegistered,
    "update": UpdateAccepted,
    "rollback": ExpertRolledBack,
    "retract": WorkerRetracted,
    "fold": GatewayFolded,
    "go_on": ExpertWentOn,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
#: Stands for an expert where an event is of the gateway; no expert can have this name.
GATEWAY = "@gateway"


def row_of(event: Event) -> dict[str, object]:
    """The columns of an event."""
    payload = asdict(event)
    if isinstance(event, ExpertRegistered):
        payload["manifest"] = event.manifest.to_json()
    update = event if isinstance(event, UpdateAccepted) else None
    expert, version = _place(event)
    return {
        "kind": _NAMES[type(event)],
        "expert": expert,
        "version": version,
        "worker": update.worker if update else None,
        "epoch": update.epoch if update else None,
        "sequence": update.sequence if update else None,
        "digest": event.digest if isinstance(event, (UpdateAccepted, GatewayFolded)) else None,
        "payload": json.dumps(payload, allow_nan=False),
    }


def _place(event: Event) -> tuple[str, int]:
    """Whose event it is and the version it makes; no two events have the same place."""
    match event:
        case ExpertRegistered():
            return event.expert, 0
        case GatewayFolded():
            return GATEWAY, event.number
        case _:
            return event.expert, event.version


def event_of(kind: str, payload: str) -> Event:
    """The event that `row_of` wrote."""
    values = json.loads(payload)
    if kind == "register":
        values["manifest"] = Manifest.from_json(values["manifest"])
    if kind == "fold":
        values["notes"] = tuple(values["notes"])
    return _KINDS[kind](**values)
