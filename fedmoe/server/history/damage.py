"""Unreadable updates: the error that names one, the event that skips it; a replay's progress in the log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import structlog

from fedmoe.federation.events import UpdateAccepted, UpdateLost
from fedmoe.server.storage.blobs import CorruptBlobError

_log = structlog.get_logger("fedmoe.history")
#: Updates of an expert that may be left out. Where more are missing a snapshot is lost and the bytes before it were let
#: go of: what could be made of the rest is not the expert.
MOST_LEFT_OUT = 16
_TELL_SECONDS = 5.0


class DamagedUpdateError(CorruptBlobError):
    """The bytes of an update that is needed are missing or not those that were stored; `missing` says which."""

    def __init__(self, update: UpdateAccepted, reason: str, missing: bool) -> None:
        made = f"version {update.version} of {update.expert}"
        super().__init__(
            f"the update that made {made} cannot be read: {reason}. Put the file back from a backup. To go on "
            f"without this update, start once with --skip-damaged: {update.expert} gets one more version, made of all "
            f"its other updates, and those from version {update.version} on cannot be rolled back to."
        )
        self.update = update
        self.missing = missing

    def left_out(self, version: int, at: float) -> UpdateLost:
        """The event that leaves the update out as the expert's next version."""
        lost = self.update
        return UpdateLost(
            lost.expert, lost.worker, lost.epoch, lost.sequence, lost.digest, lost.version, version, str(self), at
        )


def with_progress(updates: Sequence[UpdateAccepted]) -> Iterator[UpdateAccepted]:
    """The same updates; says every few seconds how far whoever lands them has come, and how long it will take."""
    began = said = time.monotonic()
    for done, update in enumerate(updates):
        now = time.monotonic()
        if now - said >= _TELL_SECONDS:
            said = now
            left = round((now - began) / done * (len(updates) - done), 1)
            _log.info("replaying", expert=update.expert, updates=done, of=len(updates), seconds_left=left)
        yield update
