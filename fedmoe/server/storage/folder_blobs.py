"""Blobs as files in a folder of a local disk, and the trash for those that no journal names."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.files import fsync_folder
from fedmoe.server.storage.blobs import (
    KEPT_DAYS,
    NO_ROOM,
    UNNAMED_SECONDS,
    BlobReferences,
    CorruptBlobError,
    MissingBlobError,
    Pins,
    StorageFailedError,
    SweepReport,
    checked_digest,
    disk_full,
    is_digest,
)

# Never fill the disk to the last byte: the journal must still be able to say that the disk is full.
_RESERVE_SHARE = 0.02
_RESERVE_BYTES = 256 << 20
_DAY_NAME = re.compile(r"\d{4}-\d\d-\d\d")


def blob_names(folder: Path) -> set[str]:
    """The digests of the blobs in a folder."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if is_digest(entry.name)}


class FolderBlobStore:
    """Blobs as files in a folder of a local disk: written aside, fsynced, renamed, and the folder fsynced.

    After an I/O error it takes no more blobs: what the disk holds then is unknown, and a second fsync may lie.
    """

    shared = False

    def __init__(self, folder: Path, reserve_bytes: int | None = None) -> None:
        self.folder = folder
        self._incoming = folder / "incoming"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._incoming.mkdir(exist_ok=True, mode=0o700)
        for made in (folder, folder.parent):
            fsync_folder(made)
        self.pins = Pins()
        self.failed: str | None = None
        total = shutil.disk_usage(folder).total
        self._reserve = reserve_bytes if reserve_bytes is not None else min(int(total * _RESERVE_SHARE), _RESERVE_BYTES)

    def writer(self) -> FileBlobWriter:
        if self.failed:
            raise StorageFailedError(self.failed)
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise self.problem(error, self.folder) from error
        if free < self._reserve:
            raise disk_full(self.folder)
        return FileBlobWriter(self._incoming / secrets.token_hex(16), self)

    def path(self, digest: str) -> Path:
        """Where a blob lies; raises ValueError for what is no digest."""
        return self.folder / checked_digest(digest)

    def read(self, digest: str) -> bytes:
        try:
            # Without O_NONBLOCK a pipe in a blob's place would be waited for.
            descriptor = os.open(self.path(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                raise MissingBlobError(f"blob {digest} is missing from {self.folder}") from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CorruptBlobError(f"blob {digest} is no file; restore it from a backup")
        with open(descriptor, "rb") as file:
            data = file.read()
        actual = hashlib.sha256(data).hexdigest()
        if actual != digest:
            raise CorruptBlobError(f"blob {digest} holds bytes with digest {actual}; restore it from a backup")
        return data

    def delete(self, *digests: str) -> None:
        paths = {digest: self.path(digest) for digest in digests}
        with self.pins.unpinned(*digests) as free:
            for digest in free:
                paths[digest].unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        return iter(blob_names(self.folder))

    def sizes(self) -> dict[str, int]:
        sizes = {}
        for name in blob_names(self.folder):
            with contextlib.suppress(FileNotFoundError):
                sizes[name] = (self.folder / name).lstat().st_size
        return sizes

    def size(self, digest: str) -> int:
        try:
            return self.path(digest).lstat().st_size
        except FileNotFoundError:
            return 0

    def free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def remove_unfinished(self) -> int:
        """Remove what writers that are gone have left; returns how many files."""
        unfinished = list(self._incoming.iterdir())
        for path in unfinished:
            path.unlink()
        return len(unfinished)

    def sweep(self, named: BlobReferences, now: float, newest: float) -> SweepReport:
        trash, there = Trash(self.folder / "trash"), set(self.digests())
        unfinished, replaced = self.remove_unfinished(), there & named.replaced - named.needed
        for digest in replaced:
            self.path(digest).unlink()
        taken_back = [name for name in trash.names() & named.needed - there if trash.take_back(name, self.path(name))]
        unnamed = [self.path(digest) for digest in there - named.needed - named.replaced]
        old = [path for path in unnamed if path.lstat().st_mtime < now - UNNAMED_SECONDS]
        for path in old:
            trash.add(path, now)
        removed = unfinished + len(replaced) + trash.empty(min(now, newest))
        return SweepReport(removed, len(old), len(taken_back))

    def problem(self, error: OSError, where: Path) -> Exception:
        """What an error while writing means: a refusal where more room helps, else the end of this store."""
        if error.errno in NO_ROOM:
            return disk_full(self.folder)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return RefusedError("busy", "too many files are open.", "Retry later; raise the limit with 'ulimit -n'.")
        self.failed = self.failed or f"writing {where} failed: {error.strerror or error}"
        return StorageFailedError(self.failed)


class FileBlobWriter:
    """One file being written under a random name; it gets its real name only once it is on disk."""

    def __init__(self, temporary: Path, store: FolderBlobStore) -> None:
        self._temporary = temporary
        self._store = store
        self._hasher = hashlib.sha256()
        self._size = 0
        self._pinned: str | None = None
        try:
            self._descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise store.problem(error, temporary) from error
        self._open = True

    @property
    def size(self) -> int:
        return self._size

    @property
    def digest(self) -> str:
        return self._hasher.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._hasher.update(view)
        self._size += len(view)
        while view:
            try:
                written = os.write(self._descriptor, view)
            except OSError as error:
                raise self._store.problem(error, self._temporary) from error
            view = view[written:]  # a short write is legal and happens when a disk fills up

    def view(self) -> memoryview:
        if self._size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(self._descriptor, self._size, access=mmap.ACCESS_READ))

    def commit(self) -> str:
        digest = self.digest
        final = self._store.path(digest)
        self._pinned = digest
        self._store.pins.add(digest)
        try:
            os.fsync(self._descriptor)
            os.rename(self._temporary, final)
            fsync_folder(self._store.folder)
        except OSError as error:
            raise self._store.problem(error, final) from error
        self._close()
        return digest

    def abort(self) -> None:
        if self._open:
            self._close()
            self._temporary.unlink(missing_ok=True)
        if self._pinned is not None:
            self._store.pins.remove(self._pinned)
            self._pinned = None

    def _close(self) -> None:
        os.close(self._descriptor)
        self._open = False


class Trash:
    """Blobs that no journal names: one folder a day, made when first needed.

    A blob is moved here when it has been unnamed for a day, and goes for good when it has been here for 30 days of the
    federation's own time: the newest event's, so that a clock set forward empties nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, path: Path, now: float) -> None:
        """Move a file here; `now` is seconds since 1970."""
        day = self.folder / _day(now).isoformat()
        day.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.replace(path, day / path.name)

    def take_back(self, name: str, to: Path) -> bool:
        """Move the newest file of this name to `to`, if there is one."""
        copies = [day / name for day in self._days() if (day / name).exists()]
        if copies:
            os.replace(copies[-1], to)
            fsync_folder(to.parent)
        return bool(copies)

    def names(self) -> set[str]:
        return {entry.name for day in self._days() for entry in day.iterdir()}

    def empty(self, now: float) -> int:
        """Remove for good what came more than `KEPT_DAYS` before `now`; returns how many files."""
        old = [day for day in self._days() if date.fromisoformat(day.name) < _day(now) - timedelta(days=KEPT_DAYS)]
        removed = 0
        for day in old:
            removed += len(list(day.iterdir()))
            shutil.rmtree(day)
        return removed

    def _days(self) -> Iterator[Path]:
        if self.folder.is_dir():
            yield from sorted(day for day in self.folder.iterdir() if _DAY_NAME.fullmatch(day.name) and day.is_dir())


def _day(now: float) -> date:
    return datetime.fromtimestamp(now, UTC).date()
