"""The newest acknowledged journal position, in a small file: a start notices an older journal in its place.

An older journal put in the place of a newer one, or one whose write-ahead log is gone, is whole in itself; only what
is known outside of it tells. The file is written after each commit and before anybody hears of it. It is not synced
then: the fault it is there for is a file exchanged or lost, not a power cut, after which a count that lags behind the
journal, by seconds, is as good as the crash between commit and count that may happen anyway.

Two places are written in turn, so that a torn one leaves the one before. A file that is missing or of which neither
place can be read says nothing: the start goes on, says so and makes a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmoe.runtime.files import write_atomic
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.chain import GENESIS

#: One place: a sector, which disks write whole or not at all.
_PLACE = 512


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a journal: how many events and which chain value, how many transactions, and whose history it is."""

    events: int = 0
    chain: str = GENESIS
    changes: int = 0
    incarnation: str = ""

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> Head:
        """What `to_text` wrote; raises ValueError."""
        try:
            return cls(**json.loads(text))
        except TypeError as error:
            raise ValueError(str(error)) from error


class AcknowledgedFile:
    """The file, open for its one writer; safe to write from the thread that commits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            write_atomic(path, bytes(2 * _PLACE))
        self._descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)

    def read(self) -> Head | None:
        """The newest head that can be read; None where there is none."""
        return _newest(os.pread(self._descriptor, 2 * _PLACE, 0))

    def write(self, head: Head) -> None:
        """Note a head in the place of the one before the last; raises StorageFailedError."""
        try:
            written = os.pwrite(self._descriptor, _place(head), head.changes % 2 * _PLACE)
        except OSError as error:
            raise StorageFailedError(f"writing {self.path} failed: {error.strerror or error}") from error
        if written != _PLACE:
            raise StorageFailedError(f"only {written} of {_PLACE} bytes of {self.path} were written")

    def start_anew(self, head: Head) -> None:
        """Make this the newest head whatever was noted before, on disk when this returns."""
        os.pwrite(self._descriptor, bytes(2 * _PLACE), 0)
        self.write(head)
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.fdatasync(self._descriptor)
        os.close(self._descriptor)


def read_acknowledged(path: Path) -> Head | None:
    """What such a file says, read from outside; None where it is not there or cannot be read."""
    return _newest(path.read_bytes()) if path.is_file() and not path.is_symlink() else None


def _newest(data: bytes) -> Head | None:
    heads = [_of_place(data[:_PLACE]), _of_place(data[_PLACE : 2 * _PLACE])]
    return max((head for head in heads if head is not None), key=lambda head: head.changes, default=None)


def _place(head: Head) -> bytes:
    text = head.to_text()
    return f"{text} {hashlib.sha256(text.encode()).hexdigest()}".ljust(_PLACE - 1).encode() + b"\n"


def _of_place(place: bytes) -> Head | None:
    text, _, checksum = place.decode(errors="replace").strip().rpartition(" ")
    if hashlib.sha256(text.encode()).hexdigest() != checksum:
        return None
    try:
        return Head.of_text(text)
    except (ValueError, TypeError):  # another program's: as good as none
        return None


@dataclass(frozen=True, slots=True)
class JournalGap:
    """What a journal lacks of what was acknowledged, in words, and how it came to that and what to put back."""

    reason: str
    advice: str = (
        "An older journal.sqlite was put there, or its journal.sqlite-wal is gone. Put the right one back; if the "
        "journal is in PostgreSQL, name its database"
    )


def journal_gap(noted: Head, head: Head, chain_there: str | None, former: Collection[str] = ()) -> JournalGap | None:
    """What a journal that ends at `head` lacks of what was noted; None where it has all of it.

    `chain_there` is the journal's chain value after as many events as were noted, `former` are the incarnations before
    its own.
    """
    reason = ""
    if noted.events > head.events:
        reason = f"it holds {head.events} events and {noted.events} were acknowledged"
    elif noted.chain != chain_there:
        reason = f"its event {noted.events} is not the one that was acknowledged, so it is of another history"
    elif noted.changes > head.changes:
        reason = f"it holds {head.changes} changes and {noted.changes} were acknowledged"
    # An empty journal is of no incarnation that another one could have taken the place of.
    named = head.events and head.incarnation and noted.incarnation
    if not named or noted.incarnation in {head.incarnation, *former}:
        return JournalGap(reason) if reason else None
    return JournalGap(
        f"it is of the incarnation {head.incarnation}, and the one in use last was {noted.incarnation}, with "
        f"{noted.events} events" + (f" ({reason})" if reason else ""),
        "That other one began when this one was left, with --accept-older-journal or 'fedmoe state restore', and what "
        "was acknowledged since is in its journal only. Put that one back",
    )
