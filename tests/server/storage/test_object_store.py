"""What an object store must do beyond every store, with a real S3 server and a way to it that can be disturbed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from s3_server import ACCESS_KEY, SECRET_KEY, Answer, Asked, CutError, Way
from support import accepted, free_port, registered, sha256

from fedmoe.config import CoordinatorConfig
from fedmoe.coordinator import Aggregation
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.history import History
from fedmoe.server.storage import bucket as bucket_module
from fedmoe.server.storage import object_store
from fedmoe.server.storage.blobs import BlobReferences, CorruptBlobError, MissingBlobError, SweepReport, put
from fedmoe.server.storage.bucket import BlobUrlError, Bucket
from fedmoe.server.storage.folder_blobs import FolderBlobStore
from fedmoe.server.storage.object_store import ObjectBlobStore, open_blobs
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.server.storage.state_dir import StateDir
from fedmoe.server.storage.tables import INCARNATIONS_BEFORE
from fedmoe.server.upkeep.sweep import DailySweep

pytestmark = pytest.mark.scale

DATA = bytes(range(256)) * 20
DIGEST = sha256(DATA)
DAY = 86_400.0


@pytest.fixture
def spool(tmp_path: Path) -> FolderBlobStore:
    return FolderBlobStore(tmp_path / "blobs", reserve_bytes=0)


@pytest.fixture
def bucket(bucket_url: str) -> Bucket:
    return Bucket(bucket_url)


@pytest.fixture
def store(bucket: Bucket, spool: FolderBlobStore) -> ObjectBlobStore:
    return ObjectBlobStore(bucket, spool)


@pytest.fixture
def journal(tmp_path: Path) -> SqliteJournal:
    return SqliteJournal(tmp_path / "journal.sqlite")


def keys(bucket: Bucket) -> list[str]:
    return sorted(facts.key for where in ("blobs", "incoming", "trash", "probe") for facts in bucket.list(where))


def spooled(spool: FolderBlobStore) -> int:
    return sum(path.is_file() for path in spool.folder.rglob("*"))


def times(
    number: int, answer: Answer | type[CutError], of: Callable[[Asked], bool]
) -> Callable[[Asked], Answer | None]:
    """Disturb the first requests that fit."""
    left = [number]

    def disturb(asked: Asked) -> Answer | None:
        if not of(asked) or not left[0]:
            return None
        left[0] -= 1
        if isinstance(answer, Answer):
            return answer
        raise answer

    return disturb


def is_write(asked: Asked) -> bool:
    return asked.method == "PUT" and "/blobs/" in asked.path


def everything(asked: Asked) -> bool:
    return True


# Writing.


def test_a_body_waits_in_the_spool_and_nothing_of_it_stays_there(
    store: ObjectBlobStore, spool: FolderBlobStore
) -> None:
    writer = store.writer()
    writer.write(DATA)
    assert spooled(spool) == 1
    assert writer.commit() == DIGEST
    writer.abort()
    assert spooled(spool) == 0
    assert keys(store.bucket) == [f"blobs/{DIGEST}"]


def test_two_writers_at_once_are_told_to_look_again_and_one_writes(store: ObjectBlobStore, way: Way) -> None:
    """409 ConditionalRequestConflict is not 412: nobody may have written."""
    way.disturb = times(1, Answer(409, "ConditionalRequestConflict"), is_write)
    put(store, DATA)
    assert store.read(DIGEST) == DATA


def test_a_write_whose_answer_was_lost_is_a_write(store: ObjectBlobStore, way: Way) -> None:
    way.disturb_answer = times(1, CutError, is_write)
    put(store, DATA)
    assert store.read(DIGEST) == DATA
    assert [asked.split()[0] for asked in way.asked if "/blobs/" in asked].count("PUT") == 2


@pytest.mark.parametrize("answer", [Answer(503, "SlowDown"), Answer(500, "InternalError"), CutError])
def test_a_failure_that_passes_is_not_seen(store: ObjectBlobStore, way: Way, answer: Answer | type[CutError]) -> None:
    way.disturb = times(2, answer, everything)
    put(store, DATA)
    way.disturb = times(2, answer, everything)
    assert store.read(DIGEST) == DATA


def test_bytes_stored_again_are_compared_by_size_and_mended(store: ObjectBlobStore, bucket: Bucket) -> None:
    bucket.put(f"blobs/{DIGEST}", DATA[:-1])
    with pytest.raises(CorruptBlobError, match="backup"):
        store.read(DIGEST)
    put(store, DATA)
    assert store.read(DIGEST) == DATA


def test_an_old_object_is_made_young_by_whoever_stores_the_same_bytes(
    bucket: Bucket, spool: FolderBlobStore, way: Way
) -> None:
    put(ObjectBlobStore(bucket, spool), DATA)
    for hours, writes in ((0.5, 1), (2, 2)):
        way.asked.clear()
        put(ObjectBlobStore(bucket, spool, lambda ahead=hours: time.time() + ahead * 3600), DATA)  # type: ignore[misc]
        assert sum(asked.startswith("PUT") for asked in way.asked) == writes


@pytest.fixture
def small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is above a megabyte goes in parts, of the smallest size that S3 takes."""
    monkeypatch.setattr(object_store, "_ONE_REQUEST_BYTES", 1 << 20)
    monkeypatch.setattr(bucket_module, "_PART_BYTES", 5 << 20)


@pytest.mark.usefixtures("small_requests")
def test_a_large_body_goes_in_parts_and_appears_whole(store: ObjectBlobStore, way: Way) -> None:
    data = os.urandom(12 << 20)
    digest = put(store, data)
    assert store.read(digest) == data
    assert keys(store.bucket) == [f"blobs/{digest}"]
    assert sum("partNumber=" in asked for asked in way.asked) == 3
    way.asked.clear()
    assert put(store, data) == digest
    assert not any("partNumber=" in asked for asked in way.asked)


@pytest.mark.usefixtures("small_requests")
def test_a_large_body_that_arrived_in_part_never_gets_its_name(store: ObjectBlobStore, way: Way) -> None:
    def shortened(asked: Asked) -> Answer | None:
        if asked.method == "POST" and "uploadId=" in asked.path:
            store.bucket.put(asked.path.split("?")[0].split("/of/fedmoe/")[1], b"a part of it")
            return Answer(404, "NoSuchUpload")
        return None

    way.disturb = shortened
    with pytest.raises(RefusedError) as refused:
        put(store, os.urandom(6 << 20))
    assert refused.value.code == "blobs_unavailable"
    assert keys(store.bucket) == []


# Failing.


def test_a_store_that_is_gone_refuses_and_is_well_again_when_it_is_back(
    store: ObjectBlobStore, spool: FolderBlobStore, way: Way
) -> None:
    earlier = put(store, b"earlier")
    way.close()
    for call in (lambda: put(store, DATA), lambda: store.read(earlier), lambda: store.size(DIGEST), store.sizes):
        with pytest.raises(RefusedError, match=r"does not answer.*retry later") as refused:
            call()
        assert refused.value.code == "blobs_unavailable"
    assert spooled(spool) == 0
    way.open()
    assert store.read(put(store, DATA)) == DATA
    assert store.read(earlier) == b"earlier"


def test_a_missing_blob_is_missing_and_a_silent_store_loses_none(store: ObjectBlobStore, way: Way) -> None:
    with pytest.raises(MissingBlobError, match=DIGEST):
        store.read(DIGEST)
    way.disturb = lambda asked: Answer(503, "SlowDown")
    with pytest.raises(RefusedError, match="SlowDown with status 503"):
        store.read(DIGEST)


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_denied_access_says_what_to_set_and_shows_no_secret(store: ObjectBlobStore, way: Way, code: str) -> None:
    way.disturb = lambda asked: Answer(403, code)
    with pytest.raises(RefusedError, match=r"denies access.*AWS_SECRET_ACCESS_KEY") as refused:
        put(store, DATA)
    shown = "".join(map(str, (refused.value, refused.value.__cause__)))
    assert SECRET_KEY not in shown
    assert ACCESS_KEY not in shown
    assert len(way.asked) == 1


def test_only_digests_become_keys(store: ObjectBlobStore) -> None:
    for call in (store.read, store.delete, store.size):
        with pytest.raises(ValueError, match="not a sha256 digest"):
            call("../federation")


def test_what_is_no_blob_neither_counts_nor_stops_a_sweep(store: ObjectBlobStore, bucket: Bucket) -> None:
    bucket.put("blobs/readme.txt", b"of somebody else")
    assert list(store.digests()) == []
    later = time.time() + 100 * DAY
    assert store.sweep(BlobReferences(set()), later, later) == SweepReport()
    assert bucket.get("blobs/readme.txt") is not None


# Sweeping.


def test_what_no_journal_names_goes_to_the_trash_after_a_day_and_comes_back_when_it_is_read(
    store: ObjectBlobStore,
) -> None:
    put(store, DATA)
    now, nothing = time.time(), BlobReferences(set())
    assert store.sweep(nothing, now + 0.9 * DAY, now) == SweepReport()
    assert store.sweep(nothing, now + 1.1 * DAY, now) == SweepReport(to_trash=1)
    assert keys(store.bucket) == [f"trash/{DIGEST}"]
    assert store.read(DIGEST) == DATA
    assert keys(store.bucket) == [f"blobs/{DIGEST}"]


def test_the_trash_gives_back_what_a_journal_needs_and_is_emptied_by_the_federations_time(
    store: ObjectBlobStore,
) -> None:
    put(store, DATA)
    put(store, b"of no row")
    now, later = time.time(), time.time() + 40 * DAY
    store.sweep(BlobReferences(set()), now + 2 * DAY, now)
    assert store.sweep(BlobReferences({DIGEST}), later, now) == SweepReport(taken_back=1)
    assert keys(store.bucket) == [f"blobs/{DIGEST}", f"trash/{sha256(b'of no row')}"]
    assert store.sweep(BlobReferences({DIGEST}), later, later) == SweepReport(removed=1)
    assert keys(store.bucket) == [f"blobs/{DIGEST}"]


def test_many_blobs_are_deleted_in_one_request_but_for_those_just_stored(store: ObjectBlobStore, way: Way) -> None:
    digests = [put(store, bytes([number])) for number in range(20)]
    writer = store.writer()
    writer.write(bytes([7]))
    writer.commit()
    way.asked.clear()
    store.delete(*digests, "f" * 64)
    assert [asked.split()[0] for asked in way.asked] == ["POST"]
    assert list(store.digests()) == [digests[7]]
    writer.abort()


def test_a_deletion_leaves_nothing_in_the_trash_either(store: ObjectBlobStore, bucket: Bucket) -> None:
    """An erasure is one for good."""
    put(store, DATA)
    bucket.copy(f"blobs/{DIGEST}", f"trash/{DIGEST}")
    store.delete(DIGEST)
    with pytest.raises(MissingBlobError):
        store.read(DIGEST)
    assert keys(bucket) == []


def test_a_sweep_leaves_what_is_being_stored_and_what_was_stored_since_it_looked(
    store: ObjectBlobStore, bucket: Bucket, way: Way
) -> None:
    put(store, DATA)
    later = time.time() + 2 * DAY
    writer = store.writer()
    writer.write(DATA)
    writer.commit()
    assert store.sweep(BlobReferences(set()), later, later) == SweepReport()
    writer.abort()

    def stored_by_another(asked: Asked) -> Answer | None:
        if asked.method == "HEAD":
            way.disturb = lambda asked: None
            time.sleep(1.1)  # times of objects are whole seconds
            bucket.put(f"blobs/{DIGEST}", DATA)
        return None

    way.disturb = stored_by_another
    assert store.sweep(BlobReferences(set()), later, later) == SweepReport()
    assert keys(bucket) == [f"blobs/{DIGEST}"]


def test_a_sweep_removes_what_a_large_upload_has_left(store: ObjectBlobStore, bucket: Bucket) -> None:
    bucket.put("incoming/half", b"half")
    now = time.time()
    assert store.sweep(BlobReferences(set()), now + 3600, now) == SweepReport()
    assert store.sweep(BlobReferences(set()), now + 2 * DAY, now) == SweepReport(removed=1)


def test_the_daily_sweep_of_a_coordinator_keeps_what_its_journal_names_and_a_restored_one_sweeps_nothing(
    store: ObjectBlobStore, journal: SqliteJournal
) -> None:
    named, unnamed = put(store, DATA), put(store, b"of no row")
    journal.append([registered(), accepted(1, digest=named)])
    history = History(journal, store, Aggregation())
    sweep = DailySweep(journal, store, history, lambda: time.time() + 2 * DAY).sweep
    journal.begin_incarnation()
    assert sweep() == SweepReport()
    journal.set_meta(INCARNATIONS_BEFORE, "[]")
    assert sweep() == SweepReport(to_trash=1)
    assert keys(store.bucket) == [f"blobs/{named}", f"trash/{unnamed}"]


def test_a_start_sweeps_nothing(store: ObjectBlobStore, journal: SqliteJournal, way: Way) -> None:
    put(store, b"of another replica")
    way.asked.clear()
    History(journal, store, Aggregation(), clock=lambda: time.time() + 100 * DAY).recover()
    assert way.asked == []


# Opening.


def test_opening_leaves_only_its_mark_and_finds_its_blobs_again(
    bucket_url: str, spool: FolderBlobStore, journal: SqliteJournal
) -> None:
    first = open_blobs(bucket_url, spool, journal)
    assert keys(first.bucket) == []
    digest = put(first, DATA)
    spool.writer().write(b"of a process that is gone")
    journal.append([registered()])
    again = open_blobs(bucket_url, spool, journal)
    assert again.read(digest) == DATA
    assert spooled(spool) == 0


def test_a_look_alike_that_overwrites_is_refused(
    bucket_url: str, spool: FolderBlobStore, journal: SqliteJournal, way: Way
) -> None:
    def without_condition(asked: Asked) -> Answer | None:
        asked.headers.pop("if-none-match", None)
        return None

    way.disturb = without_condition
    with pytest.raises(BlobUrlError, match=r"of two conditional writes.*second has to be refused"):
        open_blobs(bucket_url, spool, journal)
    way.disturb = lambda asked: Answer(501, "NotImplemented") if "if-none-match" in asked.headers else None
    with pytest.raises(RefusedError, match="NotImplemented with status 501"):
        open_blobs(bucket_url, spool, journal)
    assert keys(Bucket(bucket_url)) == []


def test_the_blobs_of_another_federation_are_refused(
    bucket_url: str, spool: FolderBlobStore, journal: SqliteJournal, tmp_path: Path
) -> None:
    open_blobs(bucket_url, spool, journal)
    other = SqliteJournal(tmp_path / "other.sqlite")
    with pytest.raises(BlobUrlError, match="belongs to another federation"):
        open_blobs(bucket_url, spool, other)
    open_blobs(f"{bucket_url}/other", spool, other)
    for mine in (journal, other):
        mine.append([registered()])
    for wrong in (f"{bucket_url}/new", bucket_url):
        with pytest.raises(BlobUrlError, match=r"holds no blobs of this state|another federation"):
            open_blobs(wrong, spool, other)


def test_a_state_keeps_the_place_of_its_blobs(bucket_url: str, tmp_path: Path) -> None:
    in_folder = StateDir.open(tmp_path / "in_folder")
    in_folder.journal.append([registered()])
    in_folder.close()
    with pytest.raises(BlobUrlError, match="they lie in its folder; drop --blobs"):
        StateDir.open(tmp_path / "in_folder", blobs_url=bucket_url)
    StateDir.open(tmp_path / "in_bucket", blobs_url=bucket_url).close()
    with pytest.raises(BlobUrlError, match=f"start with --blobs {bucket_url}"):
        StateDir.open(tmp_path / "in_bucket")
    StateDir.open(tmp_path / "in_bucket", blobs_url=bucket_url).close()


def refusal(url: str, spool: FolderBlobStore, journal: SqliteJournal) -> str:
    with pytest.raises(RefusedError) as refused:
        open_blobs(url, spool, journal)
    return str(refused.value)


def test_what_is_wrong_with_the_environment_is_said(
    bucket_url: str, spool: FolderBlobStore, journal: SqliteJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such bucket" in refusal("s3://nobody-made-this/x", spool, journal)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    assert "AWS_ALLOW_HTTP=true" in refusal(bucket_url, spool, journal)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    with monkeypatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        assert "Check the network, AWS_ENDPOINT_URL" in refusal(bucket_url, spool, journal)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert "no credentials were found" in refusal(bucket_url, spool, journal)
    with pytest.raises(BlobUrlError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        Bucket("az://container/prefix")


def test_a_url_is_that_of_a_bucket() -> None:
    assert CoordinatorConfig(blobs="s3://bucket/a/b/").blobs == "s3://bucket/a/b"
