"""Events as rows of the journal's table: indexed columns, and the whole event as JSON, each field of its type."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, astuple, fields
from functools import cache
from typing import NoReturn, cast

from fedmoe.federation.events import (
    Event,
    ExpertRebased,
    ExpertRegistered,
    ExpertRenamed,
    ExpertRetired,
    ExpertRolledBack,
    ExpertUnretired,
    GatewayMerged,
    HeldUpdateRejected,
    UpdateAccepted,
    UpdateHeld,
    UpdateLost,
    WorkerRetracted,
)
from fedmoe.lora.manifest import Manifest
from fedmoe.server.storage.blobs import StorageFailedError

_KINDS: dict[str, type[Event]] = {
    "register": ExpertRegistered,
    "update": UpdateAccepted,
    "rollback": ExpertRolledBack,
    "retract": WorkerRetracted,
    "fold": GatewayMerged,
    "go_on": ExpertRebased,
    "hold": UpdateHeld,
    "reject": HeldUpdateRejected,
    "lost": UpdateLost,
    "rename": ExpertRenamed,
    "retire": ExpertRetired,
    "unretire": ExpertUnretired,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
#: Stands for an expert where an event is of the gateway; no expert can have this name.
GATEWAY = "@gateway"
#: The same for what is held: such a row has no columns of an update, since the one that lands it has them.
QUARANTINE = "@quarantine"
#: The same for events that change who is there and no weights.
ROLL = "@experts"


def row_of(event: Event) -> dict[str, object]:
    """The columns of an event."""
    payload = asdict(event)
    if isinstance(event, ExpertRegistered):
        payload["manifest"] = event.manifest.to_json()
    expert, version = _place(event)
    worker, epoch, sequence = event.identity if isinstance(event, UpdateAccepted) else (None, None, None)
    return {
        "kind": _NAMES[type(event)],
        "expert": expert,
        "version": version,
        "worker": worker,
        "epoch": epoch,
        "sequence": sequence,
        "digest": blob_of(event) if isinstance(event, (UpdateAccepted, GatewayMerged)) else None,
        "payload": json.dumps(payload, allow_nan=False),
    }


def blob_of(event: Event) -> str | None:
    """The digest of the blob that an event names."""
    return getattr(event, "digest", None)


def _place(event: Event) -> tuple[str, int]:
    """Whose event it is and the version it makes; no two events have the same place."""
    match event:
        case ExpertRegistered():
            return event.expert, 0
        case GatewayMerged():
            return GATEWAY, event.number
        case UpdateHeld() | HeldUpdateRejected():
            return QUARANTINE, event.number
        case ExpertRenamed() | ExpertRetired() | ExpertUnretired():
            return ROLL, event.number
        case _:
            return event.expert, event.version


def event_of(kind: str, payload: str) -> Event:
    """The event that `row_of` wrote; raises `StorageFailedError` for a row that it cannot have written."""
    try:
        event_type = _KINDS.get(kind)
        if event_type is None:
            raise ValueError(f"its kind is {kind!r}, which this version does not know")
        values = _parse_payload(payload)
        _check_values(event_type, values)
        if kind == "register":
            values["manifest"] = _manifest(values["manifest"])
        if kind == "fold":
            values["notes"] = tuple(cast(list[str], values["notes"]))
        return event_type(**values)  # type: ignore[arg-type]  # _check_values has looked
    except ValueError as error:
        raise StorageFailedError(
            f"a row of the journal cannot be read: {error}. "
            "Start the version that wrote it, or restore the state directory from a backup."
        ) from error


def chained_event_of(kind: str, payload: str) -> Event:
    """`event_of` for a row whose chain was checked, so that it is what `row_of` wrote: of updates, which are many,
    the values are not looked at once more.
    """
    if kind == "update":
        try:
            return UpdateAccepted(**json.loads(payload))
        except (TypeError, ValueError, RecursionError):
            pass  # another version's, or damaged since: `event_of` says what is wrong
    return event_of(kind, payload)


def _manifest(value: object) -> Manifest:
    try:
        manifest = Manifest.from_json(cast(dict[str, object], value))
        numbers = [manifest.layout.rank, *(n for m in manifest.layout.modules for n in (m.in_features, m.out_features))]
        names = [*astuple(manifest.base), *(module.name for module in manifest.layout.modules)]
        if not all(type(number) is int for number in numbers) or not all(type(name) is str for name in names):
            raise TypeError("a size is no count, or a name no text")
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"its manifest is none: {error!r}") from error
    return manifest


def _parse_payload(payload: object) -> dict[str, object]:
    """The JSON object of a row; raises ValueError for anything else, and for numbers that are not finite."""
    if not isinstance(payload, str):
        raise ValueError(f"its payload is {type(payload).__name__}, not text")
    try:
        values = json.loads(payload, parse_constant=_not_a_number)
    except RecursionError:
        raise ValueError("its payload is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("its payload is no JSON object")
    return values


def _check_values(kind: type, values: Mapping[str, object]) -> None:
    """Raise ValueError unless `values` are the fields of the dataclass `kind`, each of its type."""
    checks, needed = _checks(kind)
    if unknown := values.keys() - checks.keys():
        raise ValueError(f"it has fields that this version does not know: {sorted(unknown)[:5]}")
    if missing := needed - values.keys():
        raise ValueError(f"it lacks {sorted(missing)[:5]}")
    for name, value in values.items():
        if not checks[name](value):
            raise ValueError(f"its {name} is {repr(value)[:80]}")


@cache
def _checks(kind: type) -> tuple[dict[str, Callable[[object], bool]], frozenset[str]]:
    checks = {field.name: _FITS.get(str(field.type), lambda value: True) for field in fields(kind)}
    needed = frozenset(
        field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING
    )
    return checks, needed


def _not_a_number(constant: str) -> NoReturn:
    raise ValueError(f"its payload holds {constant}")


def _number(value: object) -> bool:
    if type(value) is int:
        return -(1 << 64) < value < 1 << 64
    return type(value) is float and math.isfinite(value)


_FITS: Mapping[str, Callable[[object], bool]] = {
    "str": lambda value: type(value) is str,
    "int": lambda value: type(value) is int and 0 <= value < 1 << 64,
    "float": _number,
    "tuple[str, ...]": lambda value: isinstance(value, list | tuple) and all(map(_FITS["str"], value)),
    "dict[str, int]": lambda value: isinstance(value, dict) and all(map(_FITS["int"], value.values())),
    "dict[str, float]": lambda value: isinstance(value, dict) and all(map(_number, value.values())),
}
