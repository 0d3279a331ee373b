"""Release and rejection of updates in quarantine, by an administrator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from fedmoe.coordinator import CentralCoordinator
from fedmoe.federation.events import UpdateHeld
from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.codec import decode
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.blobs import BlobStore, CorruptBlobError, MissingBlobError
from fedmoe.server.updates.committer import Committer
from fedmoe.server.updates.in_flight import CrashMarkers, InFlightBody
from fedmoe.server.updates.landing import UpdateDecider
from fedmoe.server.updates.upload import usable_norm
from fedmoe.wire.contract.messages import UpdateResult

_log = structlog.get_logger("fedmoe.coordinator")


@dataclass(frozen=True)
class HeldUpdates:
    """Releases and rejects held updates; `clock` gives seconds since 1970."""

    coordinator: CentralCoordinator
    blobs: BlobStore
    committer: Committer
    landing: UpdateDecider
    in_flight: CrashMarkers
    clock: Callable[[], float]

    def release(self, number: int) -> UpdateResult:
        """Let a held update land, as if it had arrived now."""
        held = self.coordinator.quarantine.numbered(number)
        with self.in_flight.processing(InFlightBody(held.digest, held.expert, held.worker, held.sequence, held.size)):
            delta = self._read(held)
            now = self.clock
            result = self.committer.submit(
                lambda transaction: self.landing.release(transaction, number, delta, now())
            ).result()
        self.in_flight.forget(held.digest)
        _log.warning("released", held=number, expert=result.expert, version=result.version)
        return result

    def reject(self, number: int, reason: str) -> None:
        """Reject a held update: it never lands, its sender is told, its bytes are deleted."""
        now = self.clock
        event = self.committer.submit(lambda transaction: transaction.reject(number, reason, now())).result()
        _log.warning("rejected", held=event.held, expert=event.expert, worker=event.worker, sequence=event.sequence)

    def _read(self, held: UpdateHeld) -> FloatVector:
        layout = self.coordinator.expert(held.expert).manifest.layout
        try:
            flat = decode(self.blobs.read(held.digest), layout).flat
        except (MissingBlobError, CorruptBlobError) as error:
            raise RefusedError(
                "held_lost",
                f"what update {held.number} holds cannot be read: {error}.",
                "Restore a backup, or reject it.",
            ) from error
        usable_norm(layout, flat)
        return flat
