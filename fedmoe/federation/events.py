"""What the journal keeps: every change of the federation as a frozen fact, in the order it happened."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fedmoe.lora.manifest import Manifest


@dataclass(frozen=True, slots=True)
class ExpertRegistered:
    """An expert came to be, with the seed its first weights were drawn from.

    `token` is the hash of the token it was registered with, empty where none was asked for.
    """

    expert: str
    worker: str
    manifest: Manifest
    seed: int
    at: float
    token: str = ""


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
    def identity(self) -> tuple[str, str, int]:
        """Names the update, once and for all."""
        return self.worker, self.epoch, self.sequence

    @property
    def landed_norm(self) -> float | None:
        """The L2 norm of the delta after clipping, before learning rate and staleness, if it says what is usual.

        None if it is not known, and of an update that changes nothing or far less than others do (`low`).
        """
        norm = self.info.get("norm")
        return None if not norm or self.info.get("low") else norm * self.info.get("clip", 1.0)


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


@dataclass(frozen=True, slots=True)
class UpdateLost:
    """The expert's next version is what it would be without one update, whose bytes `digest` can no longer be read.

    `(worker, epoch, sequence)` names the update, which made version `made`.
    """

    expert: str
    worker: str
    epoch: str
    sequence: int
    digest: str
    made: int
    version: int
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class GatewayMerged:
    """What experts had learned since they left the gateway became part of it; `number` counts these folds.

    `version` is the gateway's version from then on, `digest` names the blob that holds it. By expert: `sources` is the
    version that was folded, `staleness` the folds between the one it had left from and this one, `weights` what its
    delta was multiplied with.
    """

    number: int
    version: int
    digest: str
    sources: dict[str, int]
    staleness: dict[str, int]
    weights: dict[str, float]
    truncation_error: float
    seconds: float
    notes: tuple[str, ...]
    at: float


@dataclass(frozen=True, slots=True)
class ExpertRebased:
    """The expert's next version is the gateway after fold `gateway`, blob `digest`, and what that fold had not seen.

    That is its last `again` updates, landed on the gateway once more in their order.
    """

    expert: str
    gateway: int
    digest: str
    again: int
    version: int
    at: float


@dataclass(frozen=True, slots=True)
class UpdateHeld:
    """An update waits for an administrator's word, and nothing of it has landed; `number` names it for people.

    `newest_version` and `staleness` are what its sender was told; `token` is the hash of the token it came with, empty
    where none is asked for. If it is released, an `UpdateAccepted` with its identity follows.
    """

    number: int
    expert: str
    worker: str
    epoch: str
    sequence: int
    base_version: int
    digest: str
    size: int
    newest_version: int
    staleness: int
    reason: str
    token: str
    at: float
    info: dict[str, float] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[str, str, int]:
        """Names the update, once and for all."""
        return self.worker, self.epoch, self.sequence


@dataclass(frozen=True, slots=True)
class HeldUpdateRejected:
    """The held update with the number `held` will never land; `number` follows those of held updates."""

    number: int
    held: int
    expert: str
    worker: str
    epoch: str
    sequence: int
    digest: str
    reason: str
    at: float

    @property
    def identity(self) -> tuple[str, str, int]:
        """Names the update, once and for all."""
        return self.worker, self.epoch, self.sequence


#: What happens beside the experts: none of it changes one, or a gateway.
QuarantineEvent = UpdateHeld | HeldUpdateRejected


@dataclass(frozen=True, slots=True)
class ExpertRenamed:
    """The expert goes by another name; all that is journalled of it knows it by `expert`, its first one, for ever.

    `number` counts renames, retirements and returns of all experts.
    """

    expert: str
    name: str
    number: int
    at: float


@dataclass(frozen=True, slots=True)
class ExpertRetired:
    """The expert takes no more updates and is no part of the gateway; what it is stays. `number` as in a rename."""

    expert: str
    number: int
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class ExpertUnretired:
    """The retired expert is back as it was. `number` as in a rename."""

    expert: str
    number: int
    at: float


#: What changes who is there and by which name, and no weights.
RollEvent = ExpertRenamed | ExpertRetired | ExpertUnretired
Event = (
    ExpertRegistered
    | UpdateAccepted
    | ExpertRolledBack
    | WorkerRetracted
    | UpdateLost
    | GatewayMerged
    | ExpertRebased
    | QuarantineEvent
    | RollEvent
)


@dataclass(frozen=True, slots=True, eq=False)
class Lineage:
    """The updates a version is made of, as a chain from the newest back; versions share what they have in common.

    `start` is where the expert went on from the gateway, None where it began at version 0. The end of a chain that
    starts from the gateway is a node without an update.
    """

    update: UpdateAccepted | None
    before: Lineage | None
    length: int
    start: ExpertRebased | None

    @staticmethod
    def extend(before: Lineage | None, update: UpdateAccepted) -> Lineage:
        """One update more."""
        return Lineage(update, before, 1 + length(before), start(before))

    @staticmethod
    def updates(chain: Lineage | None) -> list[UpdateAccepted]:
        """The updates in order, from where the chain starts."""
        found: list[UpdateAccepted] = []
        while chain is not None and chain.update is not None:
            found.append(chain.update)
            chain = chain.before
        return found[::-1]


def length(chain: Lineage | None) -> int:
    """Updates in a chain; None is the chain of version 0."""
    return chain.length if chain is not None else 0


def start(chain: Lineage | None) -> ExpertRebased | None:
    """Where the expert last went on from the gateway before the chain's updates; None if it began at version 0."""
    return chain.start if chain is not None else None


def lineages(events: Iterable[Event]) -> dict[int, Lineage | None]:
    """Version -> the updates that version is made of, for the events of ONE expert in order.

    Rollback takes an earlier version's updates, retraction filters the newest ones, going on from the gateway keeps the
    last few; all keep the order, so landing a lineage's updates on its start rebuilds the weights bit for bit.
    """
    found: dict[int, Lineage | None] = {0: None}
    newest = 0
    for event in events:
        match event:
            case ExpertRegistered() | GatewayMerged() | UpdateHeld() | HeldUpdateRejected():
                continue
            case ExpertRenamed() | ExpertRetired() | ExpertUnretired():
                continue
            case UpdateAccepted():
                found[event.version] = Lineage.extend(found[newest], event)
            case ExpertRolledBack():
                found[event.version] = found[event.to_version]
            case WorkerRetracted():
                found[event.version] = without_worker(found[newest], event.worker)
            case UpdateLost():
                found[event.version] = without_update(found[newest], event)
            case ExpertRebased():
                found[event.version] = from_gateway(found[newest], event)
        newest = event.version
    return found


def from_gateway(chain: Lineage | None, event: ExpertRebased) -> Lineage:
    """The chain that starts from the gateway and holds the last updates of `chain` again."""
    updates = Lineage.updates(chain)
    found = Lineage(None, None, 0, event)
    for update in updates[len(updates) - event.again :]:
        found = Lineage.extend(found, update)
    return found


def without_worker(chain: Lineage | None, worker: str) -> Lineage | None:
    """The chain without one worker's updates; the part before the first of them is shared, not copied."""
    return _without(chain, lambda update: update.worker == worker)


def without_update(chain: Lineage | None, lost: UpdateLost) -> Lineage | None:
    """The chain without one update; the part before it is shared, not copied."""
    name = (lost.worker, lost.epoch, lost.sequence)
    return _without(chain, lambda update: (update.worker, update.epoch, update.sequence) == name)


def _without(chain: Lineage | None, left_out: Callable[[UpdateAccepted], bool]) -> Lineage | None:
    shared, node = chain, chain
    passed: list[UpdateAccepted] = []
    kept = 0
    while node is not None and node.update is not None:
        if left_out(node.update):
            shared, kept = node.before, len(passed)
        else:
            passed.append(node.update)
        node = node.before
    for update in reversed(passed[:kept]):
        shared = Lineage.extend(shared, update)
    return shared
