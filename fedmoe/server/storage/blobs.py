"""Blob stores: bytes addressed by sha256, durable once they have a name; what their errors mean."""

from __future__ import annotations

import errno
import re
import threading
from collections import Counter
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedmoe.runtime.errors import RefusedError

#: Errors of a disk, or a quota, that is full.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: So long a blob is unnamed before it is moved to the trash, and so long it stays there.
UNNAMED_SECONDS = 86_400.0
KEPT_DAYS = 30
_DIGEST = re.compile("[0-9a-f]{64}")


def is_digest(name: str) -> bool:
    """Whether a name is a sha256 in hex; only such names become paths or keys, never one from outside."""
    return _DIGEST.fullmatch(name) is not None


def checked_digest(digest: str) -> str:
    """The digest; raises ValueError for what is none."""
    if not is_digest(digest):
        raise ValueError(f"not a sha256 digest: {digest!r}")
    return digest


class BlobWriter(Protocol):
    """A blob on its way in; nothing is visible before `commit`."""

    @property
    def size(self) -> int: ...

    @property
    def digest(self) -> str:
        """sha256 of what was written so far, as 64 hex digits."""
        ...

    def write(self, data: bytes | memoryview) -> None: ...

    def view(self) -> memoryview:
        """What was written, read-only, without copying it into memory where that can be avoided."""
        ...

    def commit(self) -> str:
        """Make it durable and visible; returns the digest."""
        ...

    def abort(self) -> None:
        """Forget what was not committed; what was, may be deleted from now on. Safe to call more than once."""
        ...


class BlobStore(Protocol):
    """Where blobs live.

    `shared`: other processes may store blobs here that this one's journal does not name, so a start sweeps nothing.
    """

    @property
    def shared(self) -> bool: ...

    @property
    def pins(self) -> Pins:
        """The blobs that this process does not delete now."""
        ...

    def writer(self) -> BlobWriter: ...

    def read(self, digest: str) -> bytes:
        """The bytes, checked against the digest; raises `CorruptBlobError` or `MissingBlobError`."""
        ...

    def delete(self, *digests: str) -> None:
        """Remove blobs; one that is missing, or that somebody who has just stored the same bytes needs, is let be."""
        ...

    def digests(self) -> Iterator[str]: ...

    def sizes(self) -> dict[str, int]:
        """The bytes of every blob."""
        ...

    def size(self, digest: str) -> int:
        """The bytes of a blob, 0 for one that is not there."""
        ...

    def free(self) -> int | None:
        """The bytes for which there is room; None where there is no bound."""
        ...

    def sweep(self, named: BlobReferences, now: float, newest: float) -> SweepReport:
        """Remove unfinished writes and what was named once; what no journal ever named goes to the trash after a day.

        What the trash holds of what is needed comes back. `now` and `newest`, of the newest event, are seconds since
        1970.
        """
        ...


@dataclass(frozen=True, slots=True)
class BlobReferences:
    """The digests that a journal needs, and those it named before and needs no longer."""

    needed: Set[str]
    replaced: Set[str] = frozenset()


@dataclass(frozen=True, slots=True)
class SweepReport:
    """How many files a sweep removed for good, moved to the trash, took back from it."""

    removed: int = 0
    to_trash: int = 0
    taken_back: int = 0


class MissingBlobError(Exception):
    """The journal names a blob that is not there."""


class CorruptBlobError(Exception):
    """A blob's bytes are not those its name promises."""


def put(store: BlobStore, data: bytes) -> str:
    """Store bytes that are in memory; returns the digest."""
    writer = store.writer()
    try:
        writer.write(data)
        return writer.commit()
    finally:
        writer.abort()


class Pins:
    """Digests that must not be deleted: committed by a writer that is still open, so perhaps not yet journalled."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._going: set[str] = set()
        self._changed = threading.Condition()

    def add(self, digest: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: digest not in self._going)
            self._counts[digest] += 1

    def remove(self, digest: str) -> None:
        with self._changed:
            self._counts[digest] -= 1
            self._counts = +self._counts

    @contextmanager
    def unpinned(self, *digests: str) -> Iterator[list[str]]:
        """Those that nobody has pinned; who wants to pin one of them waits until the context ends, others do not."""
        with self._changed:
            self._changed.wait_for(lambda: self._going.isdisjoint(digests))
            free = [digest for digest in digests if digest not in self._counts]
            self._going.update(free)
        try:
            yield free
        finally:
            with self._changed:
                self._going.difference_update(free)
                self._changed.notify_all()


class StorageFailedError(Exception):
    """The disk reported an error after which nothing on it can be promised; the coordinator must stop accepting."""


def disk_full(where: Path | str) -> RefusedError:
    """The refusal for a disk without room; reads go on, and writes again once there is space."""
    return RefusedError("disk_full", f"no space left for {where}.", "Free disk space; nothing was stored, retry later.")


def no_room_to_start(where: Path | str) -> RefusedError:
    """The refusal to start on a disk without room; nothing is damaged by that."""
    return RefusedError(
        "disk_full",
        f"the disk of {where} is full, and opening the state needs some room.",
        "What was acknowledged is safe: free disk space and start again.",
    )
