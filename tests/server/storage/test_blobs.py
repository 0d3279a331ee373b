from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from memory_blobs import MemoryBlobStore
from support import sha256

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.blobs import (
    BlobReferences,
    BlobStore,
    CorruptBlobError,
    MissingBlobError,
    StorageFailedError,
    SweepReport,
    put,
)
from fedmoe.server.storage.bucket import Bucket
from fedmoe.server.storage.folder_blobs import FolderBlobStore
from fedmoe.server.storage.object_store import ObjectBlobStore

DATA = bytes(range(256)) * 20
NOW = 1e9
NOTHING = BlobReferences(set())
Store = BlobStore


@pytest.fixture(params=["folder", "memory", pytest.param("object", marks=pytest.mark.scale)])
def store(request: pytest.FixtureRequest, folder: Path) -> BlobStore:
    if request.param == "memory":
        return MemoryBlobStore()
    in_folder = FolderBlobStore(folder, reserve_bytes=0)
    if request.param == "folder":
        return in_folder
    return ObjectBlobStore(Bucket(request.getfixturevalue("bucket_url")), in_folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def folder_store(folder: Path) -> FolderBlobStore:
    return FolderBlobStore(folder, reserve_bytes=0)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# What every store must do.


def test_a_blob_is_visible_after_its_commit_and_not_before(store: Store) -> None:
    writer = store.writer()
    writer.write(DATA[:100])
    writer.write(memoryview(DATA)[100:])
    assert writer.size == len(DATA)
    assert bytes(writer.view()) == DATA
    assert list(store.digests()) == []
    with pytest.raises(MissingBlobError, match=sha256(DATA)):
        store.read(sha256(DATA))
    assert writer.digest == sha256(DATA)
    assert writer.commit() == sha256(DATA)
    writer.abort()
    assert list(store.digests()) == [sha256(DATA)]
    assert store.read(sha256(DATA)) == DATA


def test_an_empty_blob_is_a_blob(store: Store) -> None:
    writer = store.writer()
    assert bytes(writer.view()) == b""
    assert store.read(writer.commit()) == b""


def test_an_aborted_blob_leaves_nothing(store: Store) -> None:
    writer = store.writer()
    writer.write(DATA)
    writer.abort()
    writer.abort()
    assert list(store.digests()) == []
    assert store.sweep(NOTHING, NOW, NOW) == SweepReport()


def test_the_same_bytes_twice_are_one_blob(store: Store) -> None:
    assert put(store, DATA) == put(store, DATA)
    assert list(store.digests()) == [sha256(DATA)]


def test_two_writers_do_not_mix(store: Store) -> None:
    one, other = store.writer(), store.writer()
    one.write(b"one")
    other.write(b"other")
    assert store.read(one.commit()) == b"one"
    assert store.read(other.commit()) == b"other"


def test_a_deleted_blob_is_missing_and_deleting_twice_is_fine(store: Store) -> None:
    digest = put(store, DATA)
    store.delete(digest)
    store.delete(digest)
    with pytest.raises(MissingBlobError):
        store.read(digest)


def test_many_are_deleted_at_once(store: Store) -> None:
    digests = [put(store, bytes([number])) for number in range(5)]
    store.delete(*digests[1:], "f" * 64)
    store.delete()
    assert list(store.digests()) == digests[:1]


def test_a_blob_just_stored_again_outlives_the_deletion_of_its_twin(store: Store) -> None:
    """Pruning meets an upload of the same bytes that is on disk and not yet in the journal."""
    put(store, DATA)
    writer = store.writer()
    writer.write(DATA)
    digest = writer.commit()
    store.delete(digest)
    assert store.read(digest) == DATA
    writer.abort()
    store.delete(digest)
    assert list(store.digests()) == []


def test_sizes_are_those_of_the_bytes(store: Store) -> None:
    large, empty = put(store, DATA), put(store, b"")
    assert (store.size(large), store.size(empty), store.size("f" * 64)) == (len(DATA), 0, 0)
    assert store.sizes() == {large: len(DATA), empty: 0}
    store.delete(large)
    assert (store.size(large), store.sizes()) == (0, {empty: 0})


def test_a_sweep_removes_what_was_replaced_and_nothing_else(store: Store) -> None:
    """In two hours: a shared store lets be what is young."""
    kept, again, replaced, orphan = (put(store, data) for data in (b"kept", b"again", b"replaced", b"orphan"))
    named, later = BlobReferences({kept, again, "f" * 64}, {again, replaced, "e" * 64}), time.time() + 7200
    assert store.sweep(named, later, later) == SweepReport(removed=1)
    assert set(store.digests()) == {kept, again, orphan}
    assert store.sweep(named, later, later) == SweepReport()


# What a folder of files must do beyond that.


def test_a_reopened_folder_has_its_blobs_and_a_sweep_removes_unfinished_writes(folder: Path) -> None:
    first = FolderBlobStore(folder, reserve_bytes=0)
    digest = put(first, DATA)
    unfinished = first.writer()
    unfinished.write(b"half")
    again = FolderBlobStore(folder, reserve_bytes=0)
    assert again.read(digest) == DATA
    assert len(files(folder)) == 2
    assert again.sweep(BlobReferences({digest}), NOW, NOW) == SweepReport(removed=1)
    assert files(folder) == [digest]
    unfinished.abort()


def trashed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in (folder / "trash").rglob("*") if path.is_file())


def test_what_no_journal_named_for_a_day_goes_to_the_trash_and_comes_back_when_one_does(
    folder_store: FolderBlobStore, folder: Path
) -> None:
    digest = put(folder_store, DATA)
    os.utime(folder_store.path(digest), (NOW - 86_399, NOW - 86_399))
    assert folder_store.sweep(NOTHING, NOW, NOW) == SweepReport()
    assert folder_store.sweep(NOTHING, NOW + 2, NOW) == SweepReport(to_trash=1)
    assert (list(folder_store.digests()), trashed(folder)) == ([], [f"trash/2001-09-09/{digest}"])
    with pytest.raises(MissingBlobError):
        folder_store.read(digest)
    assert folder_store.sweep(BlobReferences({digest}), NOW, NOW) == SweepReport(taken_back=1)
    assert (folder_store.read(digest), trashed(folder)) == (DATA, [])


def test_the_trash_is_emptied_by_the_federations_time_and_not_by_a_clock_set_forward(
    folder_store: FolderBlobStore, folder: Path
) -> None:
    digest = put(folder_store, DATA)
    os.utime(folder_store.path(digest), (NOW - 100_000, NOW - 100_000))
    folder_store.sweep(NOTHING, NOW, NOW)
    later = NOW + 40 * 86_400
    assert folder_store.sweep(NOTHING, later, NOW) == SweepReport()
    assert folder_store.sweep(NOTHING, NOW, later) == SweepReport()
    assert len(trashed(folder)) == 1
    assert folder_store.sweep(NOTHING, later, later) == SweepReport(removed=1)
    assert trashed(folder) == []


def test_files_and_folders_are_for_their_owner_only(folder_store: FolderBlobStore, folder: Path) -> None:
    digest = put(folder_store, DATA)
    assert folder_store.path(digest).stat().st_mode & 0o777 == 0o600
    assert {entry.stat().st_mode & 0o077 for entry in folder.iterdir()} == {0}


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"x" + data[1:], lambda data: data + b"x"])
def test_a_damaged_blob_is_never_handed_out(folder_store: FolderBlobStore, damage: Callable[[bytes], bytes]) -> None:
    digest = put(folder_store, DATA)
    folder_store.path(digest).write_bytes(damage(DATA))
    with pytest.raises(CorruptBlobError, match=f"{digest}.*backup"):
        folder_store.read(digest)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_a_damaged_blob_and_not_waited_for_74(
    folder_store: FolderBlobStore, make: Callable[[Path], None]
) -> None:
    digest = put(folder_store, DATA)
    folder_store.path(digest).unlink()
    make(folder_store.path(digest))
    with pytest.raises(CorruptBlobError, match=f"{digest} is no file.*backup"):
        folder_store.read(digest)


def test_a_symlink_in_a_blobs_place_is_not_followed(folder_store: FolderBlobStore, tmp_path: Path) -> None:
    digest = put(folder_store, DATA)
    (tmp_path / "elsewhere").write_bytes(DATA)
    folder_store.path(digest).unlink()
    folder_store.path(digest).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MissingBlobError):
        folder_store.read(digest)


@pytest.mark.parametrize(
    "name", ["", "..", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "0" * 63 + "\n", "0" * 64 + "\n"]
)
def test_only_digests_become_paths(folder_store: FolderBlobStore, name: str) -> None:
    for call in (folder_store.path, folder_store.read, folder_store.delete):
        with pytest.raises(ValueError, match="not a sha256 digest"):
            call(name)


def test_a_foreign_file_neither_counts_as_a_blob_nor_stops_a_sweep(folder_store: FolderBlobStore, folder: Path) -> None:
    (folder / ".DS_Store").write_text("from a file browser")
    assert list(folder_store.digests()) == []
    assert folder_store.sweep(NOTHING, NOW, NOW) == SweepReport()


def test_short_writes_are_continued(folder_store: FolderBlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 11."""
    write, sizes = os.write, []

    def a_few_bytes(descriptor: int, data: memoryview) -> int:
        sizes.append(write(descriptor, data[:700]))
        return sizes[-1]

    monkeypatch.setattr(os, "write", a_few_bytes)
    digest = put(folder_store, DATA)
    monkeypatch.undo()
    assert len(sizes) == 8
    assert folder_store.read(digest) == DATA


def failing(number: int) -> Callable[..., int]:
    def call(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["write", "fsync", "open", "rename"])
def test_a_full_disk_refuses_leaves_nothing_and_recovers_by_itself(
    folder_store: FolderBlobStore, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """Fault 10."""
    earlier = put(folder_store, b"earlier")
    monkeypatch.setattr(os, call, failing(number))
    with pytest.raises(RefusedError, match="no space left") as refused:
        put(folder_store, DATA)
    monkeypatch.undo()
    assert refused.value.code == "disk_full"
    assert files(folder) == [earlier]
    assert folder_store.read(earlier) == b"earlier"
    assert folder_store.read(put(folder_store, DATA)) == DATA


def test_a_disk_below_its_reserve_refuses_before_a_byte_is_written(folder: Path) -> None:
    store = FolderBlobStore(folder, reserve_bytes=1 << 62)
    with pytest.raises(RefusedError) as refused:
        store.writer()
    assert refused.value.code == "disk_full"
    assert files(folder) == []


def test_a_file_size_limit_counts_as_a_full_disk(folder: Path) -> None:
    """A real limit in a real process, the nearest to a full disk that needs no privileges."""
    script = (
        "import sys; from pathlib import Path; from fedmoe.server.storage.blobs import *\n"
        "from fedmoe.server.storage.folder_blobs import *\n"
        "store = FolderBlobStore(Path(sys.argv[1]), 0)\n"
        "try: put(store, bytes(50_000))\n"
        "except RefusedError as error: print(error.code)\n"
        "print(store.read(put(store, b'small')).decode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
        check=False,
    )
    assert done.stdout.split() == ["disk_full", "small"], done.stderr
    assert files(folder) == [sha256(b"small")]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_after_an_io_error_nothing_is_taken_any_more(
    folder_store: FolderBlobStore, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    earlier = put(folder_store, b"earlier")
    monkeypatch.setattr(os, call, failing(errno.EIO))
    with pytest.raises(StorageFailedError, match="Input/output error"):
        put(folder_store, DATA)
    monkeypatch.undo()  # the disk seems well again, but a second fsync would report success for bytes that are lost
    with pytest.raises(StorageFailedError, match="Input/output error"):
        put(folder_store, DATA)
    assert files(folder) == [earlier]
    assert folder_store.read(earlier) == b"earlier"


def test_too_many_open_files_pass(folder_store: FolderBlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", failing(errno.EMFILE))
    with pytest.raises(RefusedError) as refused:
        folder_store.writer()
    monkeypatch.undo()
    assert refused.value.code == "busy"
    assert folder_store.read(put(folder_store, DATA)) == DATA


def test_bytes_and_name_are_on_disk_before_a_commit_returns(
    folder_store: FolderBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8: fsync of the file, rename, fsync of the folder that holds the name: no other order survives a power cut."""
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def log_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        steps.append(f"fsync {'folder' if path.is_dir() else 'file'}")
        fsync(descriptor)

    def log_rename(source: Path, target: Path) -> None:
        steps.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    put(folder_store, DATA)
    assert steps == ["fsync file", "rename", "fsync folder"]
