"""The binding decision on an update: it lands, is quarantined, or gets its earlier answer again.

An update lands, waits in quarantine, or was answered before and gets that answer again.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe.federation.events import HeldUpdateRejected, Identity, UpdateAccepted, UpdateHeld
from fedmoe.federation.quarantine import Quarantine
from fedmoe.federation.transaction import Submission, Transaction
from fedmoe.lora.adapter import FloatVector
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.base_history import CurrentHistory
from fedmoe.server.storage.journal import Journal
from fedmoe.server.updates.upload import refuse_other_bytes
from fedmoe.wire.contract.messages import HeldOutcome, UpdateHeader, UpdateResult

# So many of what became of a worker's held updates are told with an answer.
_MOST_OUTCOMES = 8


@dataclass(frozen=True, slots=True)
class ReceivedUpdate:
    """An update whose bytes are here: what it says of itself, its numbers, its size, the hash of its sender's token.

    There is no `delta` where its number is taken, or where a `suspicion` says why it is held without being read.
    """

    header: UpdateHeader
    submission: Submission
    delta: FloatVector | None
    size: int
    token: str
    suspicion: str = ""


@dataclass(frozen=True, slots=True)
class UpdateDecider:
    """Decides on updates of this journal's history; `at` is seconds since 1970."""

    journal: Journal
    current: CurrentHistory

    def land(self, transaction: Transaction, arrived: ReceivedUpdate, at: float) -> UpdateResult:
        """Land the update or hold it; raises RefusedError for one that may do neither."""
        submission = arrived.submission
        answer = self._answer_of(transaction, submission) or self._decided(transaction, arrived, at)
        outcomes = _outcomes(transaction.quarantine, submission)
        return answer.model_copy(update={"outcomes": outcomes}) if outcomes else answer

    def release(self, transaction: Transaction, number: int, delta: FloatVector, at: float) -> UpdateResult:
        """Let a held update land as if it had arrived now, with the staleness it has by now."""
        held = transaction.quarantine.numbered(number)
        info = dict(held.info) | {"held": float(number)}
        norm = info.pop("norm", None)
        for judged in ("clip", "low"):
            info.pop(judged, None)
        named = (held.expert, held.worker, held.epoch, held.sequence, held.base_version, held.digest)
        landed = transaction.land(Submission(*named, info, norm), delta, at, released=True)
        return self._answer(landed, transaction.gateway_version, duplicate=False)

    def _decided(self, transaction: Transaction, arrived: ReceivedUpdate, at: float) -> UpdateResult:
        self.current.check_update(arrived.header, transaction.expert(arrived.header.expert))
        landed = transaction.land(
            arrived.submission, arrived.delta, at, size=arrived.size, token=arrived.token, suspicion=arrived.suspicion
        )
        return self._answer(landed, transaction.gateway_version, duplicate=False)

    def _answer_of(self, transaction: Transaction, submission: Submission) -> UpdateResult | None:
        """The answer that the same update got before, if it did."""
        identity = (submission.worker, submission.epoch, submission.sequence)
        rejected, held = transaction.quarantine.rejected.get(identity), transaction.quarantine.held.get(identity)
        if rejected is not None:
            refuse_other_bytes(rejected, submission)
            raise RefusedError(
                "update_rejected",
                f"an administrator rejected this update of worker {rejected.worker!r}: "
                f"{rejected.reason or 'no reason'}.",
                "Go on from the newest version without it.",
            )
        earlier = held or self._earlier(transaction, identity)
        if earlier is None:
            return None
        refuse_other_bytes(earlier, submission)
        return self._answer(earlier, transaction.gateway_version, duplicate=True)

    def _earlier(self, transaction: Transaction, identity: Identity) -> UpdateAccepted | None:
        for event in transaction.events:
            if isinstance(event, UpdateAccepted) and event.identity == identity:
                return event
        return self.journal.find_update(*identity)

    def _answer(self, update: UpdateAccepted | UpdateHeld, gateway_version: int, duplicate: bool) -> UpdateResult:
        if isinstance(update, UpdateAccepted):
            version, coefficient, quarantined = update.version, update.coefficient, dict[str, object]()
        else:
            version, coefficient = update.newest_version, 0.0
            quarantined = {"status": "quarantined", "held": update.number, "note": update.reason}
        answer = UpdateResult(
            expert=update.expert,
            version=version,
            gateway_version=gateway_version,
            staleness=update.staleness,
            coefficient=coefficient,
            digest=update.digest,
            duplicate=duplicate,
        )
        return answer.model_copy(update=quarantined)


def retract_held(transaction: Transaction, expert: str, worker: str, reason: str, at: float) -> str:
    """Reject what is held of a worker whose updates are taken back; what was done, in words."""
    held = transaction.quarantine.of_worker(expert, worker)
    for update in held:
        transaction.reject(update.number, reason or "the worker's updates were retracted", at)
    if not held:
        return ""
    count = "1 held update" if len(held) == 1 else f"{len(held)} held updates"
    return f"{count} of {worker!r} {'was' if len(held) == 1 else 'were'} rejected with it."


def _outcomes(quarantine: Quarantine, submission: Submission) -> list[HeldOutcome]:
    """What became of the updates of the sender that were held, the newest last."""
    mine = (submission.expert, submission.worker, submission.epoch)
    held = [
        HeldOutcome(held=update.number, sequence=update.sequence, status="held")
        for update in quarantine.held.values()
        if _sender(update) == mine
    ]
    released = [
        HeldOutcome(held=int(update.info["held"]), sequence=update.sequence, status="released", version=update.version)
        for update in quarantine.released.values()
        if _sender(update) == mine
    ]
    rejected = [
        HeldOutcome(held=event.held, sequence=event.sequence, status="rejected", reason=event.reason)
        for event in quarantine.rejected.values()
        if _sender(event) == mine
    ]
    return sorted(held + released + rejected, key=lambda outcome: outcome.held)[-_MOST_OUTCOMES:]


def _sender(event: UpdateHeld | UpdateAccepted | HeldUpdateRejected) -> tuple[str, str, str]:
    return event.expert, event.worker, event.epoch
