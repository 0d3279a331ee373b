"""What the journal keeps: every change of the federation as a frozen fact, in the order it happened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedmoe.manifest import Manifest


@dataclass(frozen=True, slots=True)
class ExpertRegistered:
    """An expert came to be, with the seed its first weights were drawn from."""

    expert: str
    worker: str
    manifest: Manifest
    seed: int
    at: float


@dataclass(frozen=True, slots=True)
class UpdateAccepted:
    """An update landed; `(worker, epoch, sequence)` is unique, `digest` names the blob with the bytes as sent.

    `coefficient` is what the delta was multiplied with, server learning rate times staleness weight.
    """

    expert: str
    worker: str
    epoch: str
    sequence: int
    base_version: int
    digest: str
    staleness: int
    coefficient: float
    version: int
    at: float
    info: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExpertRolledBack:
    """The expert's next version has the content of an earlier one."""

    expert: str
    to_version: int
    version: int
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class WorkerRetracted:
    """The expert's next version is what it would be had `worker` contributed nothing to the current one."""

    expert: str
    worker: str
    removed: int
    version: int
    reason: str
    at: float


Event = ExpertRegistered | UpdateAccepted | ExpertRolledBack | WorkerRetracted


def lineages(events: Iterable[Event]) -> dict[int, tuple[UpdateAccepted, ...]]:
    """Version -> the updates that version is made of, for the events of ONE expert in order.

    Rollback takes an earlier version's updates, retraction filters the newest ones; both keep the order, so folding a
    lineage from version 0 rebuilds the weights bit for bit.
    """
    found: dict[int, tuple[UpdateAccepted, ...]] = {}
    newest = 0
    for event in events:
        match event:
            case ExpertRegistered():
                found[0] = ()
                continue
            case UpdateAccepted():
                found[event.version] = (*found[newest], event)
            case ExpertRolledBack():
                found[event.version] = found[event.to_version]
            case WorkerRetracted():
                found[event.version] = tuple(update for update in found[newest] if update.worker != event.worker)
        newest = event.version
    return found
