"""Blobs in memory, for tests of what does not touch the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from fedmoe.server.storage.blobs import BlobReferences, CorruptBlobError, MissingBlobError, Pins, SweepReport


class MemoryBlobStore:
    """Blobs in memory."""

    shared = False

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self.pins = Pins()

    def writer(self) -> MemoryBlobWriter:
        return MemoryBlobWriter(self._blobs, self.pins)

    def read(self, digest: str) -> bytes:
        if digest not in self._blobs:
            raise MissingBlobError(f"blob {digest} is missing")
        data = self._blobs[digest]
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise CorruptBlobError(f"blob {digest} holds bytes with digest {found}")
        return data

    def delete(self, *digests: str) -> None:
        with self.pins.unpinned(*digests) as free:
            for digest in free:
                self._blobs.pop(digest, None)

    def digests(self) -> Iterator[str]:
        yield from list(self._blobs)

    def sizes(self) -> dict[str, int]:
        return {digest: len(data) for digest, data in self._blobs.items()}

    def size(self, digest: str) -> int:
        return len(self._blobs.get(digest, b""))

    def free(self) -> None:
        return None

    def sweep(self, named: BlobReferences, now: float, newest: float) -> SweepReport:
        replaced = self._blobs.keys() & named.replaced - named.needed
        for digest in replaced:
            del self._blobs[digest]
        return SweepReport(removed=len(replaced))


class MemoryBlobWriter:
    """Bytes gathered in memory."""

    def __init__(self, blobs: dict[str, bytes], pins: Pins) -> None:
        self._blobs = blobs
        self._pins = pins
        self._pinned: str | None = None
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
        self._pinned = digest
        self._pins.add(digest)
        self._blobs[digest] = bytes(self._data)
        return digest

    def abort(self) -> None:
        self._data = bytearray()
        if self._pinned is not None:
            self._pins.remove(self._pinned)
            self._pinned = None
