"""Events: what the journal keeps of every change of a federation, in the order it happened."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedmoe.lora.adapter import Adapter, FloatVector
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.update_rules import RuleState, UpdateRule

#: Worker, epoch and sequence number: names an update, once and for all.
Identity = tuple[str, str, int]


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


class _OfOneUpdate:
    """An event that is about one update of a worker."""

    __slots__ = ()
    worker: str
    epoch: str
    sequence: int

    @property
    def identity(self) -> Identity:
        """Names the update, once and for all."""
        return self.worker, self.epoch, self.sequence


@dataclass(frozen=True, slots=True)
class UpdateAccepted(_OfOneUpdate):
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
class UpdateLost(_OfOneUpdate):
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
    """What experts had learned since they branched from the gateway became part of it; `number` counts these merges.

    `version` is the gateway's version from then on, `digest` names the blob that holds it. By expert: `sources` is the
    version that was merged, `staleness` the merges between the one it had branched from and this one, `weights` what
    its delta was multiplied with.
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
    """The expert's next version is the gateway after merge `gateway`, blob `digest`, and what that merge lacked.

    That is its last `again` updates, landed on the gateway once more in their order.
    """

    expert: str
    gateway: int
    digest: str
    again: int
    version: int
    at: float


@dataclass(frozen=True, slots=True)
class UpdateHeld(_OfOneUpdate):
    """An update waits for an administrator's decision, and nothing of it has landed; `number` names it for people.

    `newest_version` and `staleness` are those of the answer to its sender; `token` is the hash of the token it came
    with, empty where none is asked for. If it is released, an `UpdateAccepted` with its identity follows.
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


@dataclass(frozen=True, slots=True)
class HeldUpdateRejected(_OfOneUpdate):
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


#: What makes an expert's next version.
VersionEvent = UpdateAccepted | ExpertRolledBack | WorkerRetracted | UpdateLost | ExpertRebased
#: What happens beside the experts: none of it changes one, or a gateway.
QuarantineEvent = UpdateHeld | HeldUpdateRejected


@dataclass(frozen=True, slots=True)
class ExpertRenamed:
    """The expert goes by another name; the journal knows it by `expert`, its first one, for ever.

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
Event = ExpertRegistered | VersionEvent | GatewayMerged | QuarantineEvent | RollEvent


@dataclass(frozen=True, slots=True)
class CountedUpdate:
    """An update, and the steps its worker did for it."""

    update: UpdateAccepted
    steps: int


@dataclass(frozen=True, slots=True)
class EventInputs:
    """What an event is applied with: an update's `delta`, a merge's new `gateway`, any other version's `rebuilt` state.

    `since` is what an expert with a rebuilt state is made of from where it left the gateway, if experts do.
    """

    rule: UpdateRule
    delta: FloatVector | None = None
    rebuilt: RuleState | None = None
    gateway: Adapter | None = None
    since: tuple[CountedUpdate, ...] = ()
