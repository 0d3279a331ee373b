"""Blobs in an object store: spooled on the local disk, stored under their sha256 if absent, read back checked.

Keys below the prefix: `blobs/SHA256`; `incoming/` for large uploads under way; `trash/SHA256` for what no journal
names; `federation`, which says whose blobs these are.

Within a process a deletion never meets somebody who has just stored the same bytes (`Pins`). Across processes a sweep
is safe: it only takes what is a day old, who stores the same bytes anew makes them young again, and what went to the
trash all the same is taken back by the next read. A deletion (pruning, `--keep-gb`, an erasure) is not by itself: were
the very same bytes stored by another process in that moment, they would be gone. So one process deletes, the owner of
the journal, and pins what another one has stored before it reads it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.blobs import (
    KEPT_DAYS,
    UNNAMED_SECONDS,
    BlobReferences,
    BlobStore,
    CorruptBlobError,
    MissingBlobError,
    Pins,
    SweepReport,
    checked_digest,
    is_digest,
)
from fedmoe.server.storage.bucket import BlobUrlError, Bucket, ObjectFacts
from fedmoe.server.storage.folder_blobs import FileBlobWriter, FolderBlobStore
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.sqlite import connect
from fedmoe.server.storage.tables import BLOB_STORE

# Larger bodies are sent in parts, which are repeated one by one.
_ONE_REQUEST_BYTES = 64 << 20
# An object that is older is stored anew by whoever stores the same bytes: no sweep takes it for old then.
_YOUNG_SECONDS = 3600.0
# Sizes that are remembered of what was stored or read last, so that nobody asks the store for them.
_REMEMBERED = 10_000
_BLOBS, _INCOMING, _TRASH, _MARK = "blobs", "incoming", "trash", "federation"


class ObjectBlobStore:
    """Blobs in a bucket; `spool` is the folder where bodies wait while they arrive, so that none is held in memory."""

    shared = True

    def __init__(self, bucket: Bucket, spool: FolderBlobStore, clock: Callable[[], float] = time.time) -> None:
        self.bucket = bucket
        self.pins = Pins()
        self._spool = spool
        self._clock = clock
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def writer(self) -> ObjectBlobWriter:
        return ObjectBlobWriter(self._spool.writer(), self)

    def read(self, digest: str) -> bytes:
        key = _blob(digest)
        data = self.bucket.get(key)
        if data is None and self._take_back(digest):
            data = self.bucket.get(key)
        if data is None:
            raise MissingBlobError(f"blob {digest} is missing from {self.bucket.url}")
        actual = hashlib.sha256(data).hexdigest()
        if actual != digest:
            raise CorruptBlobError(f"blob {digest} holds bytes with digest {actual}; restore it from a backup")
        self._remember(digest, len(data))
        return data

    def delete(self, *digests: str) -> None:
        keys = {digest: (_blob(digest), _trashed(digest)) for digest in digests}
        with self.pins.unpinned(*digests) as free:
            for digest in free:
                self._sizes.pop(digest, None)
            self.bucket.delete(*(key for digest in free for key in keys[digest]))

    def digests(self) -> Iterator[str]:
        return (digest for digest, _ in self._listed(_BLOBS))

    def sizes(self) -> dict[str, int]:
        return {digest: facts.size for digest, facts in self._listed(_BLOBS)}

    def size(self, digest: str) -> int:
        remembered = self._sizes.get(digest)
        if remembered is not None:
            return remembered
        facts = self.bucket.facts(_blob(digest))
        return facts.size if facts else 0

    def free(self) -> None:
        return None

    def sweep(self, named: BlobReferences, now: float, newest: float) -> SweepReport:
        """As every store; everything by the age of the objects, so that what others have just stored stays."""
        removed = to_trash = taken_back = 0
        for digest, facts in self._listed(_TRASH):
            if digest in named.needed:
                taken_back += self._take_back(digest)
            elif facts.changed < min(now, newest) - KEPT_DAYS * 86_400:
                self.bucket.delete(facts.key)
                removed += 1
        for digest, facts in self._listed(_BLOBS):
            age = now - facts.changed
            if digest in named.needed:
                continue
            if digest in named.replaced:
                removed += age > _YOUNG_SECONDS and self._removed(digest, facts, keep=False)
            elif age > UNNAMED_SECONDS:
                to_trash += self._removed(digest, facts, keep=True)
        for facts in self.bucket.list(_INCOMING):
            if facts.changed < now - UNNAMED_SECONDS:
                self.bucket.delete(facts.key)
                removed += 1
        return SweepReport(removed, to_trash, taken_back)

    def store(self, digest: str, data: memoryview) -> None:
        """Make bytes durable under their digest, and young if they were there."""
        key = _blob(digest)
        if len(data) > _ONE_REQUEST_BYTES or not self.bucket.create(key, data):
            there = self.bucket.facts(key)
            if there is None or there.size != len(data) or there.changed < self._clock() - _YOUNG_SECONDS:
                self._replace(key, data)
        self._remember(digest, len(data))

    def _remember(self, digest: str, size: int) -> None:
        self._sizes[digest] = size
        if len(self._sizes) > _REMEMBERED:
            with suppress(KeyError):  # other threads do the same
                self._sizes.popitem(last=False)

    def _replace(self, key: str, data: memoryview) -> None:
        """Store whatever is there: the same key means the same bytes, so nobody can lose anything by it."""
        if len(data) <= _ONE_REQUEST_BYTES:
            self.bucket.put(key, data)
            return
        temporary = f"{_INCOMING}/{secrets.token_hex(16)}"
        try:
            self.bucket.put_in_parts(temporary, data)
            arrived = self.bucket.facts(temporary)
            if arrived is None or arrived.size != len(data) or not self.bucket.copy(temporary, key):
                size = arrived.size if arrived else 0
                detail = f"of {len(data)} bytes {size} arrived in the object store {self.bucket.url}."
                raise RefusedError("blobs_unavailable", detail, "Nothing was stored; retry later.")
        finally:
            with suppress(RefusedError):  # the sweep removes it
                self.bucket.delete(temporary)

    def _listed(self, where: str) -> Iterator[tuple[str, ObjectFacts]]:
        for facts in self.bucket.list(where):
            name = facts.key.removeprefix(f"{where}/")
            if is_digest(name):
                yield name, facts

    def _removed(self, digest: str, listed: ObjectFacts, keep: bool) -> bool:
        """Remove a blob, or move it to the trash, unless somebody has just stored the same bytes."""
        with self.pins.unpinned(digest) as free:
            if not free or self.bucket.facts(listed.key) != listed:
                return False
            if keep:
                self.bucket.copy(listed.key, _trashed(digest))
            self.bucket.delete(listed.key)
        return True

    def _take_back(self, digest: str) -> bool:
        """Fetch a blob back from the trash, if it is missing and lies there."""
        if self.bucket.facts(_blob(digest)) is None and not self.bucket.copy(_trashed(digest), _blob(digest)):
            return False
        self.bucket.delete(_trashed(digest))
        return True


class ObjectBlobWriter:
    """One body on its way: into a file of the spool, then in one piece into the bucket."""

    def __init__(self, spooled: FileBlobWriter, store: ObjectBlobStore) -> None:
        self._spooled = spooled
        self._store = store
        self._pinned: str | None = None

    @property
    def size(self) -> int:
        return self._spooled.size

    @property
    def digest(self) -> str:
        return self._spooled.digest

    def write(self, data: bytes | memoryview) -> None:
        self._spooled.write(data)

    def view(self) -> memoryview:
        return self._spooled.view()

    def commit(self) -> str:
        digest = self.digest
        self._pinned = digest
        self._store.pins.add(digest)
        self._store.store(digest, self.view())
        return digest

    def abort(self) -> None:
        self._spooled.abort()
        if self._pinned is not None:
            self._store.pins.remove(self._pinned)
            self._pinned = None


def open_blobs(url: str, spool: FolderBlobStore, journal: Journal) -> ObjectBlobStore:
    """The blobs of a journal's federation in the bucket at `url`; raises BlobUrlError or RefusedError.

    Only a store is taken that keeps what is there when asked to, and only blobs that belong to this journal.
    """
    blobs = shared_blobs(url, spool)
    claim(blobs.bucket, journal)
    return blobs


def shared_blobs(url: str, spool: FolderBlobStore) -> ObjectBlobStore:
    """The same before anybody knows whose they are: whoever owns the journal calls `claim`."""
    bucket = Bucket(url)
    _probe(bucket)
    spool.remove_unfinished()
    return ObjectBlobStore(bucket, spool)


def url_of(noted: str | None) -> str | None:
    """The URL of the object store that a journal has noted in its table `meta`; None for the state's folder."""
    return None if noted is None else str(json.loads(noted)["url"])


def refuse_without_url(journal: Journal) -> None:
    """Raise BlobUrlError for a journal whose blobs lie in an object store."""
    url = url_of(journal.meta(BLOB_STORE))
    if url is not None:
        raise BlobUrlError(f"the blobs of this state lie in an object store; start with --blobs {url}")


def blobs_beside(journal: Path) -> BlobStore:
    """The blobs of a journal's file, to look at: in the object store that it has noted, else in the folder beside it.

    A journal that cannot be read is left for whoever opens it to refuse.
    """
    folder = FolderBlobStore(journal.parent / "blobs")
    url = noted_url(journal)
    return folder if url is None else ObjectBlobStore(Bucket(url), folder)


def noted_url(journal: Path) -> str | None:
    """The URL of the object store where the blobs of a journal's file lie, if it is not the folder beside it."""
    try:
        with closing(connect(journal, "ro")) as connection:
            row = connection.execute("SELECT value FROM meta WHERE key = ?", [BLOB_STORE]).fetchone()
    except sqlite3.Error:
        return None
    return url_of(row[0] if row else None)


def _probe(bucket: Bucket) -> None:
    """Write, overwrite, list, read and delete, as a coordinator will."""
    key, first = f"probe/{secrets.token_hex(16)}", b"first"
    created = bucket.create(key, first)
    try:
        again = bucket.create(key, b"second")
        seen = [facts.key for facts in bucket.list("probe")]
        if not created or again or bucket.get(key) != first or key not in seen:
            raise BlobUrlError(
                f"{bucket.url} does not do what an object store must: of two conditional writes "
                "(If-None-Match: *) to one key the second has to be refused, and what was written has to be listed and "
                "read at once. Use a store that supports this, as S3, Google Cloud Storage and Azure do"
            )
    finally:
        with suppress(RefusedError):
            bucket.delete(key)


def claim(bucket: Bucket, journal: Journal) -> None:
    """Note in journal and bucket that they belong together, or refuse a bucket that belongs to another journal."""
    noted, mark = journal.meta(BLOB_STORE), bucket.get(_MARK)
    ours = json.loads(noted)["federation"] if noted is not None else None
    events = journal.count() > 0
    if mark is None and events:
        raise BlobUrlError(
            f"{bucket.url} holds no blobs of this state"
            + ("; correct --blobs" if ours else ", they lie in its folder; drop --blobs, or move them first")
        )
    if mark is None:
        ours = ours or secrets.token_hex(16)
        journal.set_meta(BLOB_STORE, json.dumps({"federation": ours, "url": bucket.url}))
        bucket.create(_MARK, ours.encode())
        mark = bucket.get(_MARK)
        ours = json.loads(journal.meta(BLOB_STORE) or "{}").get("federation")
    if mark is None or mark.decode("ascii", "replace") != ours:
        raise BlobUrlError(f"{bucket.url} belongs to another federation; choose another prefix for --blobs")
    if url_of(journal.meta(BLOB_STORE)) != bucket.url:  # the same blobs under another name
        journal.set_meta(BLOB_STORE, json.dumps({"federation": ours, "url": bucket.url}))


def _blob(digest: str) -> str:
    return f"{_BLOBS}/{checked_digest(digest)}"


def _trashed(digest: str) -> str:
    return f"{_TRASH}/{checked_digest(digest)}"
