"""A federation with everything in it, moved to PostgreSQL and an object store and back: the same bits."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import closing
from pathlib import Path

import forks
import numpy as np
import pytest
from crash_house import House
from postgres_server import PostgresServer
from support import LAYOUT, fold, make_flat, sha256

from fedmoe.coordinator import Aggregation
from fedmoe.federation.events import GatewayMerged, UpdateHeld
from fedmoe.lora.codec import encode
from fedmoe.lora.update_rules import USUAL_LEAST
from fedmoe.server.history.state_move import FederationPlace, move_state
from fedmoe.server.storage.audit import AUDIT_FILE
from fedmoe.server.storage.blobs import StorageFailedError, put
from fedmoe.server.storage.chained_journal import ChainedJournal, rows_digest
from fedmoe.server.storage.postgres_journal import PostgresJournal
from fedmoe.server.storage.records import DataStatistic, GatewayVerdict, Statistic, TokenFacts, TokenRecord
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.server.storage.state_dir import Database, StateDir, StateDirError
from fedmoe.server.storage.tables import ALL_TABLES, ERASURE_REQUESTS, RELEASED_BYTES

pytestmark = pytest.mark.scale

RULES = Aggregation(server_optimizer="adam", merge_after=3)


def opened(place: FederationPlace) -> StateDir:
    return StateDir.open(place.folder, blobs_url=place.blobs, database=place.database)


def fill(place: FederationPlace) -> None:
    """Experts with updates, merges, a held update, snapshots, and rows in every small table."""
    state = opened(place)
    house = House.on(state.journal, state.blobs, RULES, merges_by_itself=False)
    house.register("python")
    house.register("sql")
    for name, worker in (("python", "w1"), ("sql", "w2")):
        house.train([worker] * (USUAL_LEAST + 2), name)
    assert fold(house.service) == 1
    house.train(["w1", "w2", "w1"])
    house.push(encode(LAYOUT, 1e6 * make_flat(99)), 1000, "w3")
    journal = state.journal
    statistics = put(state.blobs, b"moments")
    journal.add_data_statistic(DataStatistic("python", "w1", "prompts", statistics, 7, 0.1 + 0.2))
    journal.add_verdict(GatewayVerdict(put(state.blobs, b"a gateway"), {"scale": 0.1 + 0.2}, 4.0))
    for number in range(3):
        journal.add_statistic(Statistic("python", f"w{number}", "held_out", {"loss": 1.5 / (number + 3)}, number))
    journal.drop_statistics([2])
    journal.put_token(TokenRecord("a" * 64, "worker", "w1", ("python",), 5.0, revoked=True))
    journal.put_token_facts([TokenFacts("a" * 64, "of \N{SNOWMAN}", "created", 1.0, None, "::1")])
    journal.put(ERASURE_REQUESTS, [{"expert": "sql", "worker": "w9", "reason": "asked", "at": 2.0}])
    journal.insert(RELEASED_BYTES, {"expert": "sql", "worker": None, "through": 0, "reason": "none", "at": 3.0})
    house.service.close()
    (place.folder / AUDIT_FILE).write_text("a line of the audit log\n")
    (place.folder / "tls").mkdir()
    (place.folder / "tls" / "key.pem").write_text("pinned by workers")
    state.close()


@pytest.fixture
def source(tmp_path: Path) -> FederationPlace:
    """A stopped federation in SQLite and a folder."""
    place = FederationPlace(tmp_path / "source")
    fill(place)
    return place


def journal_at(place: FederationPlace) -> ChainedJournal:
    if place.database is not None:
        return PostgresJournal(place.database.url)
    return SqliteJournal(place.folder / "journal.sqlite")


def rows(place: FederationPlace) -> dict[str, str]:
    """A hash of the rows of each table of a stopped federation."""
    with closing(journal_at(place)) as journal:
        return {table.name: rows_digest(journal, table) for table in ALL_TABLES}


def content(place: FederationPlace) -> dict[str, object]:
    """All that a coordinator on it has: rows, blobs, the states of experts and gateway, what is held."""
    state = opened(place)
    house = House.on(state.journal, state.blobs, RULES, merges_by_itself=False)
    seen: dict[str, object] = {"blobs": {name: sha256(state.blobs.read(name)) for name in state.blobs.digests()}}
    for name in ("python", "sql"):
        expert = house.expert(name)
        arrays = [expert.state.weights, *expert.state.moments]
        seen[name] = (expert.version, expert.state.count, [sha256(np.asarray(array).tobytes()) for array in arrays])
    gateway = house.service.coordinator.transaction().online_gateway
    assert gateway is not None
    assert gateway.number == 1
    seen["gateway"] = (gateway.number, gateway.branch_points)
    seen["held"] = house.service.coordinator.quarantine.digests()
    assert seen["held"]
    house.service.close()
    seen["head"] = (state.journal.head.events, state.journal.head.chain, state.journal.head.incarnation)
    state.close()
    return seen | {"rows": rows(place)}


@pytest.mark.parametrize("bucket", [False, True], ids=["folder", "bucket"])
def test_there_and_back_again_everything_is_the_same_to_the_bit(
    source: FederationPlace, tmp_path: Path, postgres: PostgresServer, bucket: bool, request: pytest.FixtureRequest
) -> None:
    before = content(source)
    with closing(journal_at(source)) as journal:
        kinds = {type(event) for event in journal.events()}
        assert kinds >= {GatewayMerged, UpdateHeld}
        assert all(journal.query(table.select().limit(1)) for table in ALL_TABLES), (
            "a table without rows proves nothing"
        )
    url = request.getfixturevalue("bucket_url") if bucket else None
    there = FederationPlace(tmp_path / "there", Database(postgres.schema()), url)
    made = move_state(source, there)
    assert (made.experts, made.blobs) == (2, len(before["blobs"]))  # type: ignore[arg-type]
    assert (there.folder / AUDIT_FILE).read_text() == "a line of the audit log\n"
    assert (there.folder / "tls" / "key.pem").read_text() == "pinned by workers"
    back = FederationPlace(tmp_path / "back")
    assert move_state(there, back).events == made.events
    assert rows(back) == rows(there) == before["rows"]
    assert content(there) == content(back) == before
    # Both go on by themselves: rows get new numbers, chains go on.
    for place in (there, back):
        state = opened(place)
        house = House.on(state.journal, state.blobs, RULES, merges_by_itself=False)
        house.train(["w1"])
        assert state.journal.add_statistic(Statistic("python", "w1", "held_out", {}, 9.0)).id == 4
        house.service.close()
        state.close()
        journal_at(place).close()


@pytest.mark.parametrize("place", ["blobs_placed", "rows_placed", "compared", "journal_placed"])
@pytest.mark.parametrize("to_postgres", [True, False], ids=["to PostgreSQL", "to SQLite"])
def test_killed_in_the_middle_the_source_is_as_it_was_and_the_target_refused_until_all_of_it_is_there(
    source: FederationPlace, tmp_path: Path, postgres: PostgresServer, place: str, to_postgres: bool
) -> None:
    before = rows(source)
    target = FederationPlace(tmp_path / "target", Database(postgres.schema()) if to_postgres else None)
    command = ["-m", "fedmoe", "state", "migrate", str(source.folder), str(target.folder)]
    if target.database is not None:
        command += ["--to-database-url", target.database.url]
    killed = forks.run(*command, environment=os.environ | {"FEDMOE_FAILPOINTS": f"move.{place}=1"}, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert rows(source) == before
    with pytest.raises(StateDirError, match="holds half of a federation"):
        opened(target)
    if target.database is not None and place in ("blobs_placed", "rows_placed"):
        with pytest.raises(StorageFailedError, match="holds half of the federation"):
            opened(FederationPlace(tmp_path / "elsewhere", target.database))
    other = FederationPlace(tmp_path / "other")
    opened(other).close()
    with pytest.raises(StateDirError, match="holds half of"):
        move_state(other, target)
    done = forks.run(*command, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "2 experts were rebuilt" in done.stdout
    assert rows(target) == before
    opened(target).close()


def test_what_cannot_be_moved_is_refused_and_nothing_is_made(
    source: FederationPlace, tmp_path: Path, postgres: PostgresServer
) -> None:
    target = FederationPlace(tmp_path / "target", Database(postgres.schema()))
    with pytest.raises(StateDirError, match="is both source and target"):
        move_state(source, source)
    with pytest.raises(StateDirError, match="no state directory"):
        move_state(FederationPlace(tmp_path / "none"), target)
    running = opened(source)
    with pytest.raises(StateDirError, match="in use by the coordinator"):
        move_state(source, target)
    running.close()
    assert not target.folder.exists()
    (target.folder).mkdir()
    (target.folder / "notes").touch()
    with pytest.raises(StateDirError, match="is not empty"):
        move_state(source, target)
    (target.folder / "notes").unlink()
    filled = FederationPlace(tmp_path / "filled", Database(postgres.schema()))
    fill(filled)
    with pytest.raises(StateDirError, match=r"holds .* events of a federation already"):
        move_state(source, FederationPlace(target.folder, filled.database))
    running = opened(filled)
    with pytest.raises(StorageFailedError, match="in use by another coordinator"):
        move_state(FederationPlace(source.folder, filled.database), FederationPlace(tmp_path / "new"))
    running.close()
    move_state(source, target)
    with pytest.raises(StateDirError, match="holds this very federation"):
        move_state(source, FederationPlace(tmp_path / "second", target.database))


def test_a_source_that_lacks_what_was_acknowledged_or_has_a_damaged_blob_is_not_moved(
    source: FederationPlace, tmp_path: Path, postgres: PostgresServer
) -> None:
    target = FederationPlace(tmp_path / "target", Database(postgres.schema()))
    older = tmp_path / "older.sqlite"
    shutil.copy(source.folder / "journal.sqlite", older)
    state = opened(source)
    state.journal.set_meta("a", "b")
    state.close()
    newest = (source.folder / "journal.sqlite").read_bytes()
    shutil.copy(older, source.folder / "journal.sqlite")
    with pytest.raises(StorageFailedError, match="is not the newest"):
        move_state(source, target)
    (source.folder / "journal.sqlite").write_bytes(newest)
    blob = max((source.folder / "blobs").glob("?" * 64), key=lambda path: path.stat().st_size)
    good = blob.read_bytes()
    blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(StorageFailedError, match="is damaged, of 1; nothing was moved"):
        move_state(source, target)
    blob.write_bytes(good)
    assert move_state(source, target).experts == 2
