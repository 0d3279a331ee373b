"""The binding decision on an update: it lands, is held in quarantine, or gets its earlier answer again."""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe.federation.events import HeldUpdateRejected, UpdateAccepted, UpdateHeld
from fedmoe.federation.quarantine import Quarantine
from fedmoe.federation.transaction import Submission, Transaction
from fedmoe.lora.adapter import FloatVector
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.base_history import CurrentHistory
from fedmoe.server.storage.journal import Journal
from fedmoe.wire.contract.messages import HeldOutcome, UpdateHeader, UpdateResult

# The outcomes of so many of a worker's held updates are reported with an answer.
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

    def land(self, transaction: Transaction, received: ReceivedUpdate, at: float) -> UpdateResult:
        """Land the update or hold it; raises RefusedError for one that may do neither."""
        submission = received.submission
        earlier = self._earlier(transaction, submission)
        if earlier is not None:
            answer = _answer(transaction, earlier, duplicate=True)
        else:
            self.current.check_update(received.header, transaction.expert(submission.expert))
            token, suspicion = received.token, received.suspicion
            update = transaction.land(
                submission, received.delta, at, size=received.size, token=token, suspicion=suspicion
            )
            answer = _answer(transaction, update)
        outcomes = _outcomes(transaction.quarantine, submission)
        return answer.model_copy(update={"outcomes": outcomes}) if outcomes else answer

    def release(self, transaction: Transaction, number: int, delta: FloatVector, at: float) -> UpdateResult:
        """Let a held update land as if it had arrived now, with the staleness it has by now."""
        held = transaction.quarantine.numbered(number)
        info = {name: value for name, value in held.info.items() if name not in ("norm", "clip", "low")}
        named = (held.expert, held.worker, held.epoch, held.sequence, held.base_version, held.digest)
        submission = Submission(*named, info | {"held": float(number)}, held.info.get("norm"))
        return _answer(transaction, transaction.land(submission, delta, at, released=True))

    def _earlier(self, transaction: Transaction, submission: Submission) -> UpdateAccepted | UpdateHeld | None:
        """What was decided on the same update before; refuses one that was rejected, or has other bytes."""
        identity, quarantine = (submission.worker, submission.epoch, submission.sequence), transaction.quarantine
        rejected = quarantine.rejected.get(identity)
        if rejected is not None:
            _refuse_other_bytes(rejected, submission)
            raise RefusedError(
                "update_rejected",
                f"an administrator rejected this update of worker {rejected.worker!r}: "
                f"{rejected.reason or 'no reason'}.",
                "Go on from the newest version without it.",
            )
        accepted = (event for event in transaction.events if isinstance(event, UpdateAccepted))
        earlier = (
            quarantine.held.get(identity)
            or next((event for event in accepted if event.identity == identity), None)
            or self.journal.find_update(*identity)
        )
        if earlier is not None:
            _refuse_other_bytes(earlier, submission)
        return earlier


def _refuse_other_bytes(earlier: UpdateAccepted | UpdateHeld | HeldUpdateRejected, submission: Submission) -> None:
    """The same update again is fine; another one under its number is not."""
    if (earlier.digest, earlier.expert) != (submission.digest, submission.expert):
        raise RefusedError(
            "sequence_reused",
            f"worker {submission.worker!r} already sent another update as number {submission.sequence}.",
            "Every update needs its own number; a restored worker state needs a new epoch.",
            accepted_digest=earlier.digest,
        )


def _answer(transaction: Transaction, update: UpdateAccepted | UpdateHeld, duplicate: bool = False) -> UpdateResult:
    if isinstance(update, UpdateAccepted):
        version, coefficient, quarantined = update.version, update.coefficient, dict[str, object]()
    else:
        version, coefficient = update.newest_version, 0.0
        quarantined = {"status": "quarantined", "held": update.number, "note": update.reason}
    answer = UpdateResult(
        expert=update.expert,
        version=version,
        gateway_version=transaction.gateway_version,
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
    sender = (submission.expert, submission.worker, submission.epoch)
    updates: list[UpdateHeld | UpdateAccepted | HeldUpdateRejected] = [
        *quarantine.held.values(),
        *quarantine.released.values(),
        *quarantine.rejected.values(),
    ]
    outcomes = [_outcome(update) for update in updates if (update.expert, update.worker, update.epoch) == sender]
    return sorted(outcomes, key=lambda outcome: outcome.held)[-_MOST_OUTCOMES:]


def _outcome(update: UpdateHeld | UpdateAccepted | HeldUpdateRejected) -> HeldOutcome:
    if isinstance(update, UpdateHeld):
        return HeldOutcome(held=update.number, sequence=update.sequence, status="held")
    if isinstance(update, UpdateAccepted):
        number = int(update.info["held"])
        return HeldOutcome(held=number, sequence=update.sequence, status="released", version=update.version)
    return HeldOutcome(held=update.held, sequence=update.sequence, status="rejected", reason=update.reason)
