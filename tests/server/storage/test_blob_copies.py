"""A copy of all blobs into another store, in memory, a folder or a real object store."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_blobs import MemoryBlobStore
from support import sha256

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.blob_copies import CopyReport, check_blobs, copy_blobs
from fedmoe.server.storage.blobs import BlobStore, disk_full, put
from fedmoe.server.storage.bucket import Bucket
from fedmoe.server.storage.folder_blobs import FolderBlobStore
from fedmoe.server.storage.object_store import ObjectBlobStore

BODIES = [bytes([number]) * (1000 + number) for number in range(100)]
SIZE = sum(map(len, BODIES))


@pytest.fixture
def source(tmp_path: Path) -> FolderBlobStore:
    store = FolderBlobStore(tmp_path / "source", reserve_bytes=0)
    for body in BODIES:
        put(store, body)
    return store


@pytest.fixture(params=["folder", "memory", pytest.param("object", marks=pytest.mark.scale)])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "memory":
        return MemoryBlobStore()
    in_folder = FolderBlobStore(tmp_path / "target", reserve_bytes=0)
    if request.param == "folder":
        return in_folder
    return ObjectBlobStore(Bucket(request.getfixturevalue("bucket_url")), in_folder)


def test_all_of_it_arrives_there_and_back(source: FolderBlobStore, target: BlobStore) -> None:
    steps: list[tuple[int, int]] = []
    assert copy_blobs(source, target, lambda done, count: steps.append((done, count))) == CopyReport(100, SIZE, 0, ())
    assert steps == [(done, 100) for done in range(101)]
    assert target.sizes() == source.sizes()
    assert check_blobs(target, map(sha256, BODIES)) == []
    back = MemoryBlobStore()
    assert copy_blobs(target, back) == CopyReport(100, SIZE, 0, ())
    assert check_blobs(back, map(sha256, BODIES)) == []


def test_it_goes_on_where_it_stopped(
    source: FolderBlobStore, target: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, left = target.writer, [40]

    def until_full() -> object:
        left[0] -= 1
        if left[0] < 0:
            raise disk_full("here")
        return writer()

    with monkeypatch.context() as patched:
        patched.setattr(target, "writer", until_full)
        with pytest.raises(RefusedError, match="no space left"):
            copy_blobs(source, target)
    assert len(target.sizes()) == 40
    report = copy_blobs(source, target)
    assert (report.copied, report.there) == (60, 40)
    assert copy_blobs(source, target) == CopyReport(0, 0, 100, ())


def test_what_is_damaged_is_left_out_and_named(source: FolderBlobStore, target: BlobStore) -> None:
    digest = sha256(BODIES[5])
    source.path(digest).write_bytes(b"other")
    report = copy_blobs(source, target)
    assert (report.copied, report.damaged) == (99, (digest,))
    assert digest not in target.sizes()
    (problem,) = check_blobs(target, map(sha256, BODIES))
    assert digest in problem


def test_what_vanishes_meanwhile_is_left_out(source: FolderBlobStore, target: BlobStore) -> None:
    def vanish(done: int, count: int) -> None:
        if done == 0:
            source.delete(sha256(BODIES[99]))

    assert copy_blobs(source, target, vanish).copied == 99
