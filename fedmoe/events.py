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


@dataclass(frozen=True, slots=True, eq=False)
class Lineage:
    """The updates a version is made of, as a chain from the newest back; versions share what they have in common."""

    update: UpdateAccepted
    before: Lineage | None
    length: int

    @staticmethod
    def extend(before: Lineage | None, update: UpdateAccepted) -> Lineage:
        """One update more."""
        return Lineage(update, before, 1 + (before.length if before else 0))

    @staticmethod
    def updates(chain: Lineage | None, after: Lineage | None = None) -> list[UpdateAccepted] | None:
        """The updates in order; with `after`, those that follow it, or None if `after` is not part of the chain."""
        found: list[UpdateAccepted] = []
        node = chain
        while node is not after:
            if node is None:
                return None
            found.append(node.update)
            node = node.before
        return found[::-1]


def lineages(events: Iterable[Event]) -> dict[int, Lineage | None]:
    """Version -> the updates that version is made of, for the events of ONE expert in order.

    Rollback takes an earlier version's updates, retraction filters the newest ones; both keep the order, so folding a
    lineage from version 0 rebuilds the weights bit for bit.
    """
    found: dict[int, Lineage | None] = {0: None}
    newest = 0
    for event in events:
        match event:
            case ExpertRegistered():
                continue
            case UpdateAccepted():
                found[event.version] = Lineage.extend(found[newest], event)
            case ExpertRolledBack():
                found[event.version] = found[event.to_version]
            case WorkerRetracted():
                found[event.version] = without_worker(found[newest], event.worker)
        newest = event.version
    return found


def without_worker(chain: Lineage | None, worker: str) -> Lineage | None:
    """The chain without one worker's updates; the part before the first of them is shared, not copied."""
    kept: list[UpdateAccepted] = []
    shared, node = chain, chain
    pending: list[UpdateAccepted] = []
    while node is not None:
        if node.update.worker == worker:
            kept, pending, shared = pending + kept, [], node.before
            node = node.before
            continue
        pending.insert(0, node.update)
        node = node.before
    result = shared
    for update in kept:
        result = Lineage.extend(result, update)
    return result
