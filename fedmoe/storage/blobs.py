"""Blobs: bytes addressed by their sha256, complete and on disk once they have a name."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, Self

from fedmoe.errors import RefusedError

# Never fill the disk to the last byte: the journal must still be able to say that the disk is full.
_RESERVE_SHARE = 0.02
_RESERVE_BYTES = 256 << 20


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
        """Forget it; safe to call more than once and after `commit`."""
        ...


class BlobStore(Protocol):
    """Where blobs live."""

    def writer(self) -> BlobWriter: ...

    def read(self, digest: str) -> bytes:
        """The bytes, checked against the digest; raises `CorruptBlobError` or `MissingBlobError`."""
        ...

    def delete(self, digest: str) -> None: ...

    def digests(self) -> Iterator[str]: ...

    def sweep(self, referenced: set[str]) -> int:
        """Remove unfinished writes and blobs that nothing refers to; returns how many."""
        ...


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


class FolderBlobStore:
    """Blobs as files in a folder of a local disk: written aside, fsynced, renamed, and the folder fsynced."""

    def __init__(self, folder: Path, reserve_bytes: int | None = None) -> None:
        self._folder = folder
        self._incoming = folder / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True, mode=0o700)
        total = shutil.disk_usage(folder).total
        self._reserve = reserve_bytes if reserve_bytes is not None else min(int(total * _RESERVE_SHARE), _RESERVE_BYTES)

    def writer(self) -> FileBlobWriter:
        if shutil.disk_usage(self._folder).free < self._reserve:
            raise disk_full(self._folder)
        return FileBlobWriter(self._incoming / secrets.token_hex(16), self)

    def path(self, digest: str) -> Path:
        """Where a blob lies; only hex digests become paths, never a name from outside."""
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise ValueError(f"not a sha256 digest: {digest!r}")
        return self._folder / digest[:2] / digest

    def read(self, digest: str) -> bytes:
        try:
            descriptor = os.open(self.path(digest), os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                raise MissingBlobError(f"blob {digest} is missing from {self._folder}") from None
            raise
        with open(descriptor, "rb") as file:
            data = file.read()
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise CorruptBlobError(f"blob {digest} holds bytes with digest {found}; restore it from a backup")
        return data

    def delete(self, digest: str) -> None:
        self.path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        for shard in self._folder.iterdir():
            if len(shard.name) == 2:
                yield from (entry.name for entry in shard.iterdir())

    def sweep(self, referenced: set[str]) -> int:
        removed = 0
        for entry in self._incoming.iterdir():
            entry.unlink()
            removed += 1
        for digest in list(self.digests()):
            if digest not in referenced:
                self.delete(digest)
                removed += 1
        return removed


class FileBlobWriter:
    """One file being written under a random name; it gets its real name only once it is on disk."""

    def __init__(self, temporary: Path, store: FolderBlobStore) -> None:
        self._temporary = temporary
        self._store = store
        self._hasher = hashlib.sha256()
        self._size = 0
        self._descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()

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
                raise _storage_problem(error, self._temporary) from error
            view = view[written:]  # a short write is legal and happens when a disk fills up

    def view(self) -> memoryview:
        if self._size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(self._descriptor, self._size, access=mmap.ACCESS_READ))

    def commit(self) -> str:
        digest = self.digest
        final = self._store.path(digest)
        try:
            os.fsync(self._descriptor)
            if not final.parent.exists():
                final.parent.mkdir(mode=0o700, exist_ok=True)
                fsync_folder(final.parent.parent)
            os.rename(self._temporary, final)
            fsync_folder(final.parent)
        except OSError as error:
            raise _storage_problem(error, final) from error
        self._close()
        return digest

    def abort(self) -> None:
        if self._open:
            self._close()
            self._temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        os.close(self._descriptor)
        self._open = False


class MemoryBlobStore:
    """Blobs in memory, for tests and for a coordinator that is meant to forget."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    def writer(self) -> MemoryBlobWriter:
        return MemoryBlobWriter(self._blobs)

    def read(self, digest: str) -> bytes:
        if digest not in self._blobs:
            raise MissingBlobError(f"blob {digest} is missing")
        data = self._blobs[digest]
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise CorruptBlobError(f"blob {digest} holds bytes with digest {found}")
        return data

    def delete(self, digest: str) -> None:
        self._blobs.pop(digest, None)

    def digests(self) -> Iterator[str]:
        yield from list(self._blobs)

    def sweep(self, referenced: set[str]) -> int:
        orphans = [digest for digest in self._blobs if digest not in referenced]
        for digest in orphans:
            del self._blobs[digest]
        return len(orphans)


class MemoryBlobWriter:
    """Bytes gathered in memory."""

    def __init__(self, blobs: dict[str, bytes]) -> None:
        self._blobs = blobs
        self._data = bytearray()

    @property
    def size(self) -> int:
        return len(self._data)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self._data).hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        self._data += data

    def view(self) -> memoryview:
        return memoryview(bytes(self._data))

    def commit(self) -> str:
        digest = self.digest
        self._blobs[digest] = bytes(self._data)
        return digest

    def abort(self) -> None:
        self._data = bytearray()


def fsync_folder(folder: Path) -> None:
    """Make renames and new names inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StorageFailedError(Exception):
    """The disk reported an error after which nothing on it can be promised; the coordinator must stop accepting."""


def disk_full(where: Path) -> RefusedError:
    """The refusal for a disk without room; reads go on, and writes again once there is space."""
    return RefusedError("disk_full", f"no space left for {where}.", "Free disk space; nothing was stored, retry later.")


def _storage_problem(error: OSError, where: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return disk_full(where)
    return StorageFailedError(f"writing {where} failed: {error.strerror or error}")
