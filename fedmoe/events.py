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

    @property
    def landed_norm(self) -> float | None:
        """The L2 norm of the delta after clipping, before learning rate and staleness; None if it is not known."""
        norm = self.info.get("norm")
        return None if norm is None else norm * self.info.get("clip", 1.0)


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
        return Lineage(update, before, 1 + length(before))

    @staticmethod
    def updates(chain: Lineage | None, after: Lineage | None = None) -> list[UpdateAccepted] | None:
        """The updates in order; with `after`, those that follow it, or None if `after` is not part of the chain."""
        found: list[UpdateAccepted] = []
        node = chain
        for _ in range(length(chain) - length(after)):
            assert node is not None, "a chain has as many nodes as its length says"
            found.append(node.update)
            node = node.before
        return found[::-1] if node is after else None


def length(chain: Lineage | None) -> int:
    """Updates in a chain; None is the chain of version 0."""
    return chain.length if chain is not None else 0


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
    shared, node = chain, chain
    passed: list[UpdateAccepted] = []
    kept = 0
    while node is not None:
        if node.update.worker == worker:
            shared, kept = node.before, len(passed)
        else:
            passed.append(node.update)
        node = node.before
    for update in reversed(passed[:kept]):
        shared = Lineage.extend(shared, update)
    return shared
